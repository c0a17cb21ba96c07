"""An exact resume: a run that was killed and goes on ends as the one that was not, bit by bit."""

from __future__ import annotations

import gc
import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rayrlhf.config.model import FromScratch
from rayrlhf.data.batching import Cutting
from rayrlhf.data.prompts import LMExample
from rayrlhf.models.build import from_scratch
from rayrlhf.weights.publish import PUBLISH_PARTS
from tests.faults import end_session
from tests.integration.conftest import COMMAND, ROOT, FinishedRun, rayrlhf
from tests.learners import learner_settings
from tests.ranks import run_ranks

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

# ---- a learner's state, at every ZeRO stage --------------------------------------------------------------------------

# ZeRO stage, dtype
LEARNERS = [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (2, "bfloat16"), (3, "bfloat16")]


def new_learner(stage: int, dtype: str, seed: int) -> Any:
    from rayrlhf.engines.deepspeed import Learner

    spec = FromScratch(vocab_size=300, hidden_size=32, layers=2, heads=2, context=64)
    settings = learner_settings(
        stage,
        dtype=dtype,
        weight_decay=0.1,
        average=0.9,
        # All parameters are small enough that ZeRO-3 would leave them whole; so only the norms' are. A key of ZeRO's
        # own also keeps the stage.
        deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 64}} if stage else {},
    )
    return Learner(from_scratch(spec, 64, 0, 1, seed), settings)


def learn(learner: Any, step: int) -> float:
    from rayrlhf.engines.tasks import LanguageTask

    rng = np.random.default_rng(step)
    task = LanguageTask([LMExample(rng.integers(2, 64, n).astype(np.int32), 0, "") for n in rng.integers(5, 20, 8)])
    rows = list(range(8))
    total = task.denominator(rows)
    batches = task.cut(rows[learner.rank :: learner.world_size], Cutting(40), learner.device)
    dummy = task.dummy(learner.device)
    done = learner.train_step(lambda module, batch: task.loss(module, batch, total), batches, dummy, 1e-3)
    return done["grad_norm"]


def resume_learners(rank: int, world: int, port: int, folder: str) -> None:
    import deepspeed

    from rayrlhf.engines.distributed import Rendezvous, join_process_group
    from rayrlhf.engines.state import load_state, save_state

    join_process_group(Rendezvous(rank, world, "127.0.0.1", port, "cpu", 1, deterministic=True))
    gc.freeze()
    for stage, dtype in LEARNERS:
        place = Path(folder) / f"{stage}-{dtype}"
        stayed = new_learner(stage, dtype, seed=3)
        learn(stayed, 0)
        learn(stayed, 1)
        save_state(stayed, place)
        deepspeed.comm.barrier()
        resumed = new_learner(stage, dtype, seed=4)  # other weights: all that counts must come from the files
        learn(resumed, 9)  # and nothing of a life before
        load_state(resumed, place)
        norms = [(learn(stayed, step), learn(resumed, step)) for step in (2, 3)]
        if rank == 0:
            (place / "norms.json").write_text(json.dumps(norms))
        for learner, name in ((stayed, "stayed"), (resumed, "resumed")):
            weights = {n: t.clone() for bucket in learner.named_buckets(learner.module.lm, 2**20) for n, t in bucket}
            average = {f"average.{i}": t for i, t in enumerate(learner.average.tensors)}
            if rank == 0:
                save_file(weights | average, place / f"{name}.safetensors")
    deepspeed.comm.barrier()
    gc.unfreeze()
    deepspeed.comm.destroy_process_group()


@pytest.fixture(scope="module", params=[1, 2], ids=["one_rank", "two_ranks"])
def resumed_learners(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learners")
    run_ranks(resume_learners, request.param, folder, 200.0)
    return folder


@pytest.mark.parametrize(("stage", "dtype"), LEARNERS)
def test_a_learner_that_was_saved_and_loaded_learns_on_bit_by_bit(
    resumed_learners: Path, stage: int, dtype: str
) -> None:
    place = resumed_learners / f"{stage}-{dtype}"
    stayed, resumed = load_file(place / "stayed.safetensors"), load_file(place / "resumed.safetensors")
    assert stayed.keys() == resumed.keys()
    assert all(torch.equal(stayed[name], resumed[name]) for name in stayed)
    assert all(mine == other > 0 for mine, other in json.loads((place / "norms.json").read_text()))


# ---- whole runs ------------------------------------------------------------------------------------------------------

STEPS = 4
# Of a record: what says how fast and how large, and differs from run to run.
MEASURED = ("time/", "throughput/", "memory/", "rollout/seconds", "rollout/tail_share")


def arguments(finished: FinishedRun, output: Path, name: str, *more: str) -> list[str]:
    models = [f"{stage}.path={finished.artifact(stage) / 'model'}" for stage in ("sft", "reward")]
    return [
        "configs/tiny.yaml",
        f"run.name={name}",
        f"run.output={output}",
        f"model={{path: {finished.artifact('sft') / 'model'}}}",
        *models,
        f"ppo.steps={STEPS}",
        "run.deterministic=true",
        "checkpoint.every=1",
        "ppo.ptx.coef=0.5",
        "ppo.ptx.examples_per_episode=0.5",
        "ppo.ema=0.9",
        "ppo.kl.target=0.05",
        "ppo.kl.horizon=100",
        *[a for a in finished.arguments if a.startswith(("ppo.batch", "ppo.mini", "ppo.learn", "rollout.max"))],
        *more,
    ]


def end_after(step: int, run: list[str], folder: Path, how: signal.Signals) -> int:
    """Start the run and signal its driver once the checkpoint of `step` is there; its exit code."""
    with subprocess.Popen(
        [*COMMAND, "ppo", *run], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            deadline = time.monotonic() + 300
            while not (folder / "checkpoints" / f"step-{step:06d}").exists():
                assert process.poll() is None, "the run ended before it could be killed"
                assert time.monotonic() < deadline, "the run does not get there"
                time.sleep(0.02)
            process.send_signal(how)
            return process.wait(60)
        finally:
            process.kill()
            end_session(process.pid)


def learned(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [r for r in records if r["stage"] == "ppo"]
    unmeasured = ("weights/publish_s", "weights/gib_per_s", *(f"weights/{p}_s" for p in PUBLISH_PARTS))
    return [{k: v for k, v in r.items() if not k.startswith(MEASURED) and k not in unmeasured} for r in kept]


def steps_of(folder: Path) -> dict[int, Any]:
    """What the ledger says that each step learned from: its last word on it."""
    lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    return {line["step"]: line["trained"] for line in lines if line["event"] == "step"}


@pytest.fixture(scope="module")
def whole(finished: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of PPO-ptx that nothing happened to."""
    output = tmp_path_factory.mktemp("whole")
    done = rayrlhf("ppo", *arguments(finished, output, "whole"))
    assert done.returncode == 0, done.stdout + done.stderr
    return output / "whole"


@pytest.mark.parametrize(
    ("step", "how", "code"),
    [
        pytest.param(1, signal.SIGKILL, -9, marks=pytest.mark.slow),
        pytest.param(2, signal.SIGTERM, 143, marks=pytest.mark.slow),
        (STEPS - 1, signal.SIGKILL, -9),
    ],
    ids=["killed after the first step", "asked to end", "killed before the last step"],
)
def test_a_run_that_was_ended_and_resumed_is_the_run_that_was_not(
    whole: Path, finished: FinishedRun, tmp_path: Path, step: int, how: signal.Signals, code: int
) -> None:
    run, folder = arguments(finished, tmp_path, "ended"), tmp_path / "ended"
    assert end_after(step, run, folder, how) == code
    assert not (folder / "model").exists()
    done = rayrlhf("ppo", *run, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [record["step"] for record in learned(folder)] == [1, 2, 3, 4]
    assert learned(folder) == learned(whole)
    assert (folder / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    assert steps_of(folder) == steps_of(whole)
    audit = rayrlhf("audit", str(folder))
    assert audit.returncode == 0, audit.stdout + audit.stderr
    assert "every sample is accounted for exactly once" in audit.stdout
    assert (folder / "ledger.jsonl").read_text().count('"event":"rollback"') == 1
    for model in ("model", "model_ema"):
        mine, other = (load_file(f / model / "model.safetensors") for f in (folder, whole))
        assert all(torch.equal(mine[name], other[name]) for name in other)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_so_is_a_run_of_two_ranks_under_zero(finished: FinishedRun, tmp_path: Path, stage: int) -> None:
    ranks = ("cluster.policy.ranks=2", "cluster.value.ranks=2", f"ppo.zero_stage={stage}", f"ppo.steps={STEPS - 1}")
    runs = {name: arguments(finished, tmp_path / name, "run", *ranks) for name in ("whole", "ended")}
    done = rayrlhf("ppo", *runs["whole"])
    assert done.returncode == 0, done.stdout + done.stderr
    whole, folder = tmp_path / "whole" / "run", tmp_path / "ended" / "run"
    assert end_after(1, runs["ended"], folder, signal.SIGKILL) == -9
    done = rayrlhf("ppo", *runs["ended"], "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "ledger.jsonl").read_text().count('"event":"rollback"') == 1
    assert [record["step"] for record in learned(folder)] == [1, 2, 3]
    assert learned(folder) == learned(whole)
    assert (folder / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    mine, other = (load_file(f / "model" / "model.safetensors") for f in (folder, whole))
    assert all(torch.equal(mine[name], other[name]) for name in other)


def test_an_overlapping_run_that_was_killed_goes_on_with_each_sample_once_and_none_older_than_it_may_be(
    finished: FinishedRun, tmp_path: Path
) -> None:
    """Not bit by bit: batches that were under way are drawn anew, by the policy of the checkpoint."""
    pacing = ("ppo.pacing={kind: overlap, max_staleness: 1}", "ppo.importance_cap=2.0")
    run, folder = arguments(finished, tmp_path, "overlapping", *pacing), tmp_path / "overlapping"
    assert end_after(2, run, folder, signal.SIGKILL) == -9
    done = rayrlhf("ppo", *run, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    records = learned(folder)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    ages = [record["rollout/staleness_max"] for record in records]
    assert ages[0] == 0.0
    assert max(ages) <= 1.0
    audit = rayrlhf("audit", str(folder))
    assert audit.returncode == 0, audit.stdout + audit.stderr
    samples = [sample for step in steps_of(folder).values() for sample, *_ in step]
    assert sorted(samples) == list(range(len(samples)))


def test_a_changed_setting_is_refused_and_more_steps_are_not(finished: FinishedRun, whole: Path) -> None:
    run = arguments(finished, whole.parent, "whole")
    refused = rayrlhf("ppo", *run, "ppo.clip=0.1", "--resume")
    assert refused.returncode == 2
    assert "ppo.clip was 0.2, is 0.1" in " ".join(refused.stderr.split())
    longer = rayrlhf("ppo", *run, f"ppo.steps={STEPS + 1}", "--resume")
    assert longer.returncode == 0, longer.stdout + longer.stderr
    assert [record["step"] for record in learned(whole)] == [1, 2, 3, 4, 5]
    assert list(steps_of(whole)) == [1, 2, 3, 4, 5]
    assert rayrlhf("audit", str(whole)).returncode == 0
    artifacts = (whole.parent / "artifacts").glob("ppo-*")
    assert sorted(len(steps_of(artifact)) for artifact in artifacts) == [4, 5]
