"""The engine of plan_memory.py: vLLM in a fresh process, which takes two publishes and samples after each.

Its imports are the baseline. The sender's segments, which it reads in place, do not count: the plan has them once, at
the policy. This process is the sender.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import engine_settings

from rayrlhf.config.model import FromScratch
from rayrlhf.weights.buckets import bucket_plan, pack, publish_names
from rayrlhf.weights.transports import create_sender

__all__ = ["measure_engine"]

RUN, VERSIONS, PROMPTS = "bench", 2, 12


def measure_engine(spec: FromScratch, prompt: int, response: int, bucket_bytes: int) -> int:
    """Bytes of an engine of such a model above its imports."""
    from rayrlhf.models.build import from_scratch

    model = from_scratch(spec, spec.vocab_size, 0, 1, seed=0).lm
    context = multiprocessing.get_context("spawn")
    tickets, answers = context.SimpleQueue(), context.SimpleQueue()
    sender = create_sender("shared_memory", RUN)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        engine = context.Process(target=_engine, args=(folder, spec, prompt, response, tickets, answers))
        engine.start()
        try:
            for version in range(VERSIONS):
                for ticket in _tickets(model, version, bucket_bytes, sender):
                    tickets.put(ticket)
                    _answer(engine, answers)
            return _answer(engine, answers)
        finally:
            engine.kill()
            sender.close()


def _answer(engine: Any, answers: Any) -> int:
    while answers.empty():
        engine.join(0.05)
        if engine.exitcode:
            raise SystemExit(f"the engine ended with {engine.exitcode}")
    found: int = answers.get()
    return found


def _tickets(model: Any, version: int, bucket_bytes: int, sender: Any) -> Iterator[dict[str, Any]]:
    named = dict(publish_names(model))
    buckets = bucket_plan([(name, p.nbytes) for name, p in named.items()], bucket_bytes)
    for index, names in enumerate(buckets):
        header, _ = pack([(name, named[name].data) for name in names], version, index, sender.reserve)
        yield sender.send(header) | ({"last": True} if index == len(buckets) - 1 else {})


def _engine(folder: str, spec: FromScratch, prompt: int, response: int, tickets: Any, answers: Any) -> None:
    from rayrlhf.engines.vllm import RolloutEngine, _set_environment
    from rayrlhf.types import PromptTokens, SampleRequest
    from rayrlhf.weights.probe import probe_rows

    settings = engine_settings(folder, prompt + response, response, PROMPTS, threads=2)
    _set_environment(settings)  # before vLLM is imported, as the engine does it
    import rayrlhf.engines.vllm_worker  # noqa: F401 (its imports are the baseline)

    rng = np.random.default_rng(0)
    prompts = [PromptTokens(i, rng.integers(2, spec.vocab_size, prompt).astype(np.int32)) for i in range(PROMPTS)]
    before = _status("VmRSS")
    engine = RolloutEngine(settings, prompts)
    for version in range(VERSIONS):
        engine.begin_update(version)
        last = False
        while not last:
            ticket = tickets.get()
            engine.load_bucket(ticket)
            last = "last" in ticket
            answers.put(0)
        engine.verify(probe_rows(spec.vocab_size, 64, prompt + response))
        engine.commit(version)
        list(engine.generate([SampleRequest(i, i, i) for i in range(PROMPTS)], PROMPTS))
    answers.put(_status("VmHWM") - before - _status("RssShmem"))


def _status(which: str) -> int:
    (line,) = [row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(f"{which}:")]
    return int(line.split()[1]) * 1024
