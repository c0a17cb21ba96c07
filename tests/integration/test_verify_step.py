"""`--verify-step` on a real run, and what it reads out of a learner at every ZeRO stage."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rayrlhf.config.model import FromScratch
from rayrlhf.models.build import from_scratch
from tests.integration.conftest import FinishedRun, rayrlhf
from tests.ranks import run_ranks

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

PATIENCE_S = 150.0

STEPS, WORLD = 2, 2


def test_a_step_of_sharded_ppo_ptx_is_the_reference_trainers(finished: FinishedRun) -> None:
    """Adam has a state by then, and a step before it was not looked at."""
    arguments = [a for a in finished.arguments if not a.startswith(("run.name", "ppo.steps", "tracking"))]
    sharded = ["ppo.zero_stage=3", "cluster.policy.ranks=2", "ppo.ptx.coef=1.5", "ppo.ptx.examples_per_episode=0.5"]
    shape = ["run.name=verified", "ppo.steps=2", "ppo.ptx.norms_every=1", "rollout.temperature=0.9", *sharded]
    folder = finished.output / "verified"
    done = rayrlhf("ppo", *arguments, *shape, "--verify-step", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((folder / "verify-step-2.json").read_text())
    assert report["agrees"] is True
    gaps = {row["quantity"]: row["gap"] for row in report["rows"]}
    assert len(gaps) == 19, "every quantity, those of the text and of both parts' gradients included"
    assert all(row["gap"] < row["tolerance"] for row in report["rows"])
    assert gaps["policy gradients"] > 0, "two computations, not one beside itself"
    assert "step 2 in float32 against the reference trainer" in done.stdout
    assert done.stdout.count(" ok ") == 19
    assert not (folder / "verify-step-2").exists(), "what agrees is not kept"

    again = rayrlhf("ppo", *arguments, *shape, "--verify-step", "1", "--dry-run")
    assert again.returncode == 0, again.stderr
    assert "would run: ppo; done before: nothing" in again.stdout


# ---- every ZeRO stage: in spawned processes --------------------------------------------------------------------------


def work(rank: int, world: int, port: int, folder: str) -> None:
    from rayrlhf.engines.deepspeed import Learner, LearnerSettings
    from rayrlhf.engines.distributed import Rendezvous, join_process_group
    from rayrlhf.engines.snapshot import GRADIENTS, WEIGHTS, save_adam, save_gradients, save_weights

    join_process_group(Rendezvous(rank, world, "127.0.0.1", port, "cpu", 1, deterministic=True))
    spec = FromScratch(architecture="llama", hidden_size=32, layers=1, heads=2, context=64, tie_embeddings=True)
    rows = torch.randint(2, 64, (STEPS + 1, WORLD, 1, 9), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(1, 9)
    gc.freeze()  # ZeRO-3 collects garbage when it starts: without this, most of the time goes there
    for stage in range(4):
        module = from_scratch(spec, 64, 0, 1, seed=3)
        learner = Learner(
            module, LearnerSettings(stage, "float32", "cpu", 1e-2, (0.9, 0.95), 1e-5, 0.1, 0.5, 1e4, "failed", "policy")
        )
        target = Path(folder) / str(stage)

        def step(number: int, learner: Learner = learner) -> None:
            mine = rows[number, rank]
            learner.train_step(lambda model, batch: -model(tokens=batch, positions=positions).sum(), [mine], mine, 1e-2)

        counted = [save_adam(learner, learner.module.lm, target)]
        assert not target.exists(), "no state, no file"
        for number in range(STEPS):
            step(number)
        counted.append(save_adam(learner, learner.module.lm, target))
        save_weights(learner, learner.module.lm, target / WEIGHTS)
        learner.before_step = lambda learner=learner, target=target: save_gradients(  # type: ignore[misc]
            learner, learner.module.lm, target / GRADIENTS
        )
        step(STEPS)
        assert learner.before_step is None
        assert counted == [0, STEPS]
    gc.unfreeze()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # else its threads may outlive the interpreter, which then aborts


def test_weights_adams_state_and_gradients_are_read_whole_at_every_zero_stage(tmp_path: Path) -> None:
    run_ranks(work, WORLD, tmp_path, PATIENCE_S)
    names = ["exp_avg", "exp_avg_sq", "gradients", "weights"]
    assert sorted(p.stem for p in (tmp_path / "0").iterdir()) == names
    for name in names:
        plain = load_file(tmp_path / f"0/{name}.safetensors")
        assert "model.embed_tokens.weight" in plain
        assert "lm_head.weight" not in plain, "tied: once, by its first name"
        for stage in (1, 2, 3):
            sharded = load_file(tmp_path / f"{stage}/{name}.safetensors")
            assert sharded.keys() == plain.keys()
            for key, tensor in plain.items():
                assert float(tensor.abs().max()) > 0
                torch.testing.assert_close(sharded[key], tensor, rtol=1e-4, atol=1e-4 * float(tensor.abs().max()))
