"""Buckets: what goes in comes out, and the fingerprint changes when, and only when, something else arrives."""

import dataclasses
import itertools
import json

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rayrlhf.weights import buckets
from rayrlhf.weights.buckets import BucketHeader, TensorSpec, bucket_plan, device_sums, fingerprint, pack, unpack

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool)
SIZES = st.lists(st.integers(0, 500), max_size=40)


def reserve(nbytes: int) -> torch.Tensor:
    return torch.full((nbytes + 100,), 0xAB, dtype=torch.uint8)  # more than asked, and dirty


def mixed_tensors() -> list[tuple[str, torch.Tensor]]:
    torch.manual_seed(0)
    return [
        ("odd.bf16", torch.randn(3, 5).to(torch.bfloat16)),
        ("empty", torch.empty(0, 7)),
        ("one.byte", torch.tensor([True])),
        ("scalar", torch.tensor(2.5)),
        ("odd.f32", torch.randn(17)),
        ("counts", torch.arange(3)),
        ("transposed", torch.randn(4, 3).T),
        ("empty.bf16", torch.empty(0, dtype=torch.bfloat16)),
    ]


def packed() -> tuple[BucketHeader, torch.Tensor]:
    return pack(mixed_tensors(), version=4, index=1, reserve=reserve)


def test_mixed_dtypes_and_sizes_come_back_bit_for_bit():
    tensors = mixed_tensors()
    header, buffer = packed()
    got = list(unpack(header, buffer))
    assert [name for name, _ in got] == [name for name, _ in tensors]
    for (_, sent), (_, received) in zip(tensors, got, strict=True):
        assert received.dtype == sent.dtype
        assert received.shape == sent.shape
        assert torch.equal(received, sent)


def test_tensors_start_at_multiples_of_64_bytes():
    header, buffer = pack([("a", torch.zeros(1)), ("b", torch.zeros(17)), ("c", torch.zeros(2))], 0, 0, reserve)
    # 4 bytes round up to 64; 68 bytes to 128; the last is not padded
    assert [spec.offset for spec in header.specs] == [0, 64, 192]
    assert header.nbytes == 200
    assert buffer.shape == (200,)


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"),
    [("float32", (3, 5), 60), ("bfloat16", (3, 5), 30), ("int64", (), 8), ("bool", (7,), 7), ("float32", (0, 9), 0)],
)
def test_a_spec_knows_its_bytes(dtype, shape, nbytes):
    assert TensorSpec("x", dtype, shape, 0).nbytes == nbytes


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_any_bucket_survives_the_trip_through_a_plain_dict(shapes):
    sent = [
        (f"t{i}", (torch.arange(torch.Size(shape).numel()) % 2).to(dtype).reshape(shape))
        for i, (dtype, shape) in enumerate(shapes)
    ]
    header, buffer = pack(sent, 1, 0, reserve)
    received_header = BucketHeader.from_dict(json.loads(json.dumps(header.to_dict())))
    assert received_header == header
    assert fingerprint(received_header, buffer) == fingerprint(header, buffer)
    for (name, tensor), (other, view) in zip(sent, unpack(received_header, buffer.clone()), strict=True):
        assert name == other
        assert torch.equal(tensor, view)


@given(SIZES, st.integers(1, 2000))
def test_a_plan_keeps_the_order_and_every_name_once(sizes, budget):
    plan = bucket_plan([(f"t{i}", n) for i, n in enumerate(sizes)], budget)
    assert [name for bucket in plan for name in bucket] == [f"t{i}" for i in range(len(sizes))]
    assert all(plan)


@given(SIZES, st.integers(1, 2000))
def test_a_bucket_is_within_the_budget_unless_it_is_one_large_tensor(sizes, budget):
    tensors = {f"t{i}": torch.zeros(n, dtype=torch.uint8) for i, n in enumerate(sizes)}
    for bucket in bucket_plan([(name, t.nbytes) for name, t in tensors.items()], budget):
        header, _ = pack([(name, tensors[name]) for name in bucket], 0, 0, reserve)
        assert header.nbytes <= budget or sum(tensors[name].nbytes > 0 for name in bucket) == 1


@given(SIZES, st.integers(1, 2000))
def test_neighbouring_buckets_would_not_fit_in_one(sizes, budget):
    lengths = {f"t{i}": n for i, n in enumerate(sizes)}
    plan = bucket_plan(lengths.items(), budget)
    for left, right in itertools.pairwise(plan):
        taken = sum(-(-lengths[name] // 64) * 64 for name in [*left, right[0]])
        assert taken > budget


def test_a_plan_by_hand():
    sizes = [("a", 64), ("b", 1), ("c", 64), ("huge", 1000), ("d", 64), ("e", 0)]
    assert bucket_plan(sizes, 128) == [["a", "b"], ["c"], ["huge"], ["d", "e"]]
    assert bucket_plan([], 128) == []


def test_the_first_buckets_may_be_smaller_each_half_of_the_next():
    sizes = [(name, 64) for name in "abcdefghijk"]
    assert bucket_plan(sizes, 256, smaller=2) == [["a"], ["b", "c"], ["d", "e", "f", "g"], ["h", "i", "j", "k"]]
    # one that is larger still has its own
    assert bucket_plan([("huge", 1000), *sizes[:3]], 256, smaller=2) == [["huge"], ["a", "b"], ["c"]]


def test_a_tensor_under_two_names_is_packed_and_fingerprinted_once():
    shared, other = torch.randn(5, 7), torch.randn(3)
    sent = [("embedding", shared), ("other", other), ("head", shared), ("transposed", shared.T)]
    header, buffer = pack(sent, 1, 0, reserve)
    # 140 bytes round up to 192, 12 to 64
    assert [spec.offset for spec in header.specs] == [0, 192, 0, 256]
    assert header.nbytes == 396
    assert header.places == [(0, 140), (192, 12), (256, 140)]
    for (name, tensor), (other_name, view) in zip(sent, unpack(header, buffer), strict=True):
        assert name == other_name
        assert torch.equal(tensor, view)
    before = fingerprint(header, buffer)
    buffer[0] ^= 1
    assert fingerprint(header, buffer) != before


def test_a_second_name_goes_into_the_bucket_of_the_first():
    assert bucket_plan([("a", 64), ("huge", 1000), ("head", 0), ("b", 64)], 128) == [["a"], ["huge", "head"], ["b"]]


# -------------------------------------------------------------------------------------------- fingerprint


def test_the_fingerprint_is_xxh3_of_header_and_tensor_bytes():
    header, buffer = pack([("a", torch.tensor([1.0]))], 7, 2, reserve)
    spec = "TensorSpec(name='a', dtype='float32', shape=(1,), offset=0)"
    text = f"BucketHeader(version=7, index=2, specs=({spec},))"
    assert fingerprint(header, buffer) == xxhash.xxh3_128_hexdigest(text.encode() + b"\x00\x00\x80\x3f")


def test_the_same_bucket_packed_twice_has_one_fingerprint():
    assert fingerprint(*packed()) == fingerprint(*packed())


def test_bytes_between_tensors_do_not_count():
    header, buffer = packed()
    before = fingerprint(header, buffer)
    covered = torch.zeros(header.nbytes, dtype=torch.bool)
    for spec in header.specs:
        covered[spec.offset : spec.offset + spec.nbytes] = True
    assert not covered.all()
    buffer[~covered] ^= 0xFF
    assert fingerprint(header, buffer) == before


def test_any_flipped_bit_changes_the_fingerprint():
    header, buffer = packed()
    before = fingerprint(header, buffer)
    for spec in header.specs:
        for place in range(spec.offset, spec.offset + spec.nbytes):
            for bit in (1, 128):
                buffer[place] ^= bit
                assert fingerprint(header, buffer) != before, (spec.name, place, bit)
                buffer[place] ^= bit
    assert fingerprint(header, buffer) == before


@pytest.mark.parametrize("change", [{"version": 5}, {"version": 3}, {"index": 0}, {"index": 2}])
def test_another_version_or_index_changes_the_fingerprint(change):
    header, buffer = packed()
    assert fingerprint(dataclasses.replace(header, **change), buffer) != fingerprint(header, buffer)


def test_two_names_swapped_change_the_fingerprint():
    x, y = torch.ones(4), torch.zeros(4)
    right = pack([("a", x), ("b", y)], 0, 0, reserve)
    assert fingerprint(*pack([("b", x), ("a", y)], 0, 0, reserve)) != fingerprint(*right)


@pytest.mark.parametrize("change", [{"name": "z"}, {"dtype": "int32"}, {"shape": (2, 2)}])
def test_another_name_dtype_or_shape_changes_the_fingerprint(change):
    header, buffer = pack([("a", torch.ones(4))], 0, 0, reserve)
    other = dataclasses.replace(header, specs=(dataclasses.replace(header.specs[0], **change),))
    assert fingerprint(other, buffer) != fingerprint(header, buffer)


def test_two_tensors_swapped_under_their_names_change_the_fingerprint():
    x, y = torch.ones(4), torch.zeros(4)
    assert fingerprint(*pack([("a", x), ("b", y)], 0, 0, reserve)) != fingerprint(
        *pack([("a", y), ("b", x)], 0, 0, reserve)
    )


@given(st.binary(min_size=1, max_size=100), st.data())
@settings(max_examples=200, deadline=None)
def test_any_flipped_bit_changes_the_sums_that_a_gpu_takes(data, draw):
    place, bit = draw.draw(st.integers(0, len(data) - 1)), draw.draw(st.integers(0, 7))
    flipped = bytearray(data)
    flipped[place] ^= 1 << bit
    sums = [device_sums(torch.frombuffer(bytearray(d), dtype=torch.uint8)) for d in (data, flipped)]
    assert sums[0].shape == (2,)
    assert bool((sums[0] != sums[1]).all())


def test_words_that_changed_places_change_the_sums_that_a_gpu_takes():
    words = torch.arange(1, 1001, dtype=torch.int64)
    found = {tuple(device_sums(words.view(torch.uint8)).tolist())}
    for i in range(999):
        swapped = words.clone()
        swapped[i], swapped[i + 1] = words[i + 1], words[i]
        found.add(tuple(device_sums(swapped.view(torch.uint8)).tolist()))
    assert len(found) == 1000


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        if isinstance(made, torch.Tensor) and made._base is None:
            self.nbytes = max(self.nbytes, made.nbytes)
        return made


@given(st.binary(min_size=1, max_size=300))
@settings(max_examples=100, deadline=None)
def test_the_sums_are_taken_a_piece_at_a_time_and_make_nothing_larger(data):
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    whole = device_sums(tensor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets, "SUMMED", 64)
        with Largest() as largest:
            pieces = device_sums(tensor)
    assert pieces.tolist() == whole.tolist()
    assert largest.nbytes <= 64
