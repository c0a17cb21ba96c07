"""The plan imports no engine, and so repeats some of their numbers: here they are the same."""

from rayrlhf.engines import vllm
from rayrlhf.models import logprobs, vllm_layers
from rayrlhf.planning import memory, workload
from rayrlhf.weights.transports import shared_memory
from rayrlhf.weights.transports.device import DeviceBuffers


def test_the_numbers_of_our_own_engines_are_theirs() -> None:
    assert memory.SEGMENTS == shared_memory.SEGMENTS == len(DeviceBuffers()._two)
    assert memory.KEPT == vllm_layers.LARGEST_KEPT
    assert memory.PREFILL_TOKENS == vllm.PREFILL_TOKENS
    assert memory.CHUNK_ENTRIES == logprobs.CHUNK_ENTRIES


def test_the_numbers_of_deepspeed_are_its_defaults() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    defaults = DeepSpeedZeroConfig(stage=3)
    assert defaults.prefetch_bucket_size == memory.PREFETCH_BUCKET
    assert defaults.sub_group_size == memory.SUB_GROUP
    assert defaults.reduce_bucket_size == workload.REDUCE_BUCKET
    assert defaults.max_live_parameters == workload.LIVE_PARAMETERS
