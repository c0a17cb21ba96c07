"""The rollout engine: vLLM in this process, with a version of the policy's weights.

Consumes prompts (token ids), produces `Rollout`s: response tokens, their log-probs at the sampling temperature,
and the version that sampled them. It serves only a committed version.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from time import perf_counter
from typing import Any

import numpy as np

from rayrlhf.errors import WeightSyncError
from rayrlhf.models.residence import Part
from rayrlhf.types import PromptTokens, Rollout, RolloutInfo, SampleRequest
from rayrlhf.weights.probe import ProbeRow
from rayrlhf.weights.publish import EngineReceipt
from rayrlhf.weights.transports import Meeting

__all__ = ["EngineSettings", "RolloutEngine"]


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What one engine needs to know; filled from `model`, `rollout`, `weights` and `cluster`."""

    model: str
    dtype: str
    device: str
    context: int
    max_tokens: int
    temperature: float
    tensor_parallel: int
    threads: int
    kv_cache_gib: int
    gpu_memory_utilization: float
    max_sequences: int
    transport: str
    run: str
    eos: int
    trust_remote_code: bool
    deterministic: bool
    sleeps: bool = False
    """Others use its device in turns with it."""


# Prompt tokens computed together; vLLM's own default on a CPU.
PREFILL_TOKENS = 4096


class RolloutEngine:
    def __init__(self, settings: EngineSettings, prompts: Sequence[PromptTokens]) -> None:
        _set_environment(settings)
        from vllm import LLM
        from vllm.config import WeightTransferConfig

        from rayrlhf.engines.vllm_worker import BACKEND

        self._settings = settings
        self.hold_prompts(prompts)
        self._version: int | None = None
        self._pending: int | None = None
        self._part: Part = "all"
        cpu = settings.device == "cpu"
        self._llm = LLM(
            model=settings.model,
            dtype=settings.dtype,
            max_model_len=settings.context,
            tensor_parallel_size=settings.tensor_parallel,
            # The shards are processes of this actor: inside Ray vLLM would look for bundles of its own.
            distributed_executor_backend="mp" if settings.tensor_parallel > 1 else "uni",
            max_num_seqs=settings.max_sequences,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            enforce_eager=cpu,  # compiling costs half a minute on a CPU and gains a tenth
            # A prompt cut in two makes vLLM wind a seeded generator back, which a CPU generator cannot.
            enable_chunked_prefill=not cpu,
            max_num_batched_tokens=max(settings.context, PREFILL_TOKENS),
            trust_remote_code=settings.trust_remote_code,
            config_format="hf",
            load_format="safetensors",  # no other is looked for, pickled ones least of all
            skip_tokenizer_init=True,  # ids in, ids out: one tokenizer, the driver's
            logprobs_mode="processed_logprobs",  # log softmax(logits / temperature): what the trainer computes
            worker_extension_cls="rayrlhf.engines.vllm_worker.WorkerExtension",
            weight_transfer_config=WeightTransferConfig(backend=BACKEND),
            generation_config="vllm",  # a model's own sampling defaults (top-p, ...) would bias the ratio
            seed=0,
            enable_sleep_mode=settings.sleeps and not cpu,
        )
        self._rpc("init_weight_transfer_engine", {"transport": settings.transport})

    def hold_prompts(self, prompts: Sequence[PromptTokens]) -> None:
        self._prompts = {p.prompt_id: p.tokens.tolist() for p in prompts}

    def occupy(self, part: Part) -> None:
        """Let exactly this part be on the device. A CPU engine stays where it is: vLLM cannot put one to sleep."""
        if self._settings.device == "cpu" or part == self._part:
            return
        if part == "none":
            self._llm.sleep(level=1)
        else:
            self._llm.wake_up()
        self._part = part

    @property
    def version(self) -> int | None:
        """The committed version; None while a publish is under way or after one failed."""
        return self._version

    def generate(
        self, requests: Sequence[SampleRequest], at_once: int, temperature: float | None = None
    ) -> Iterator[list[Rollout]]:
        """Sample one response per request, at the engine's own temperature unless another is given.

        Args:
            at_once: hand over this many finished responses at a time, the last ones fewer.

        Raises:
            WeightSyncError: when no verified weights are loaded.
        """
        if self._version is None:
            raise WeightSyncError("this engine holds no verified weights", "publish to it before sampling")
        from vllm import TokensPrompt

        start, engine = perf_counter(), self._llm.llm_engine
        prompts = [TokensPrompt(prompt_token_ids=self._prompts[r.prompt_id]) for r in requests]
        ids = self._llm.enqueue(prompts, [self._sampling(r, temperature) for r in requests], use_tqdm=False)
        running = {_public(name): request for name, request in zip(ids, requests, strict=True)}
        finished: list[Rollout] = []
        try:
            while running:
                for output in engine.step():
                    if output.finished:
                        request = running.pop(output.request_id)
                        finished.append(self._rollout(request, output, perf_counter() - start))
                while len(finished) >= at_once or (finished and not running):
                    yield finished[:at_once]
                    finished = finished[at_once:]
        finally:
            if running:  # whoever asked does not want the rest
                engine.abort_request(ids, internal=True)

    def _sampling(self, request: SampleRequest, temperature: float | None) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=self._settings.temperature if temperature is None else temperature,
            max_tokens=self._settings.max_tokens,
            stop_token_ids=[self._settings.eos],
            logprobs=0,
            seed=request.seed,
            detokenize=False,
        )

    def meet(self, meeting: Meeting) -> None:
        """Join the group of a transport that has one; `meeting` has the rank of the first worker."""
        self._rpc("meet_sender", asdict(meeting))

    def begin_update(self, version: int) -> None:
        """From here on nothing is sampled until `commit`."""
        self._version = None
        if self._pending is not None:  # the last publish broke off here
            self._rpc("abandon_weight_update")
        self._pending = version
        self._rpc("start_weight_update")

    def load_bucket(self, ticket: dict[str, Any]) -> None:
        if ticket["header"]["version"] != self._pending:
            raise WeightSyncError(f"a bucket of version {ticket['header']['version']} came during {self._pending}")
        self._rpc("update_weights", {"ticket": ticket})

    def verify(self, rows: Sequence[ProbeRow]) -> EngineReceipt:
        """End the update: what came, what it did not reach, and the log-probs of the probe under the new weights.

        Raises:
            WeightSyncError: when keys and values of the old weights are still cached.
        """
        self._rpc("finish_weight_update")
        self._drop_caches()
        start = perf_counter()
        logprobs = self._probe(rows)
        probe_s = perf_counter() - start
        receipts = self._llm.collective_rpc("weight_receipt")
        # Shards of one tensor-parallel engine receive the same buckets; where one got another, both are reported.
        got = zip_longest(*(prints for prints, _, _ in receipts), fillvalue="none")
        fingerprints = tuple("/".join(dict.fromkeys(prints)) for prints in got)
        missing = tuple(sorted({name for _, names, _ in receipts for name in names}))
        return EngineReceipt(fingerprints, missing, logprobs, **receipts[0][2], probe_s=probe_s)

    def _drop_caches(self) -> None:
        """Cached prefixes were computed by the old weights. No log-prob of the probe would show one that stayed."""
        reset = self._llm.reset_prefix_cache()
        core = self._llm.llm_engine.engine_core.engine_core
        blocks = core.scheduler.kv_cache_manager.block_pool
        if not reset or len(blocks.cached_block_hash_to_block):
            raise WeightSyncError("the prefix cache still holds keys and values of the old weights")

    def _probe(self, rows: Sequence[ProbeRow]) -> tuple[float, ...]:
        """Log-probs (temperature 1) of each row's targets, row after row."""
        from vllm import SamplingParams, TokensPrompt

        prompts = [TokensPrompt(prompt_token_ids=row.context) for row in rows]
        params = [
            SamplingParams(temperature=1.0, max_tokens=1, logprob_token_ids=row.targets, detokenize=False)
            for row in rows
        ]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        tables = [output.outputs[0].logprobs[0] for output in outputs]
        return tuple(float(table[t].logprob) for row, table in zip(rows, tables, strict=True) for t in row.targets)

    def commit(self, version: int) -> None:
        """Sample again, as this version; to say it once more changes nothing."""
        if version == self._version:
            return
        if version != self._pending:
            raise WeightSyncError(f"asked to commit version {version} during {self._pending}")
        self._version, self._pending = version, None

    def close(self) -> None:
        """End the shards' processes and give their shared memory back."""
        self._llm.llm_engine.engine_core.shutdown()

    def _rpc(self, method: str, argument: dict[str, Any] | None = None) -> None:
        self._llm.collective_rpc(method, args=() if argument is None else (argument,))

    def _rollout(self, request: SampleRequest, output: Any, seconds: float) -> Rollout:
        assert self._version is not None
        completion = output.outputs[0]
        prompt = self._prompts[request.prompt_id]
        response = list(completion.token_ids)
        logprobs = [step[token].logprob for token, step in zip(response, completion.logprobs, strict=True)]
        info = RolloutInfo(
            sample_id=request.sample_id,
            prompt_id=request.prompt_id,
            tokens=len(prompt) + len(response),
            response_tokens=len(response),
            truncated=response[-1] != self._settings.eos,
            version=self._version,
            seconds=seconds,
        )
        return Rollout(
            info=info,
            tokens=np.asarray(prompt + response, dtype=np.int32),
            logprobs=np.asarray(logprobs, dtype=np.float32),
            versions=np.full(len(response), self._version, dtype=np.int32),
        )


def _public(internal: str) -> str:
    """vLLM numbers requests, and marks each number to make it unique; what it reports has the number alone."""
    return internal.rpartition("-")[0]


def _set_environment(settings: EngineSettings) -> None:
    """vLLM reads these on import: set before it, and only in the process that hosts the engine."""
    # vLLM forks a process per shard for tensor parallelism; one shard stays in this process, which starts 20 s sooner.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_LOGGING_LEVEL"] = "INFO"
    if settings.deterministic and settings.device == "cuda":
        os.environ["VLLM_BATCH_INVARIANT"] = "1"  # log-probs that do not depend on who else is in the batch
    if settings.device == "cpu":
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(settings.kv_cache_gib)
        threads, cores = settings.threads, sorted(os.sched_getaffinity(0))
        shards = range(settings.tensor_parallel)
        binds = [{cores[(s * threads + t) % len(cores)] for t in range(threads)} for s in shards]
        bind = "|".join(",".join(map(str, sorted(cpus))) for cpus in binds)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind" if settings.tensor_parallel == 1 else bind
        os.environ["OMP_NUM_THREADS"] = str(threads)
