"""Transports: the bytes that arrive are the bytes sent, and nothing is left behind in /dev/shm."""

import os
from pathlib import Path

import pytest
import torch

from rayrlhf.errors import ConfigError
from rayrlhf.weights.buckets import BucketHeader, fingerprint, pack, unpack
from rayrlhf.weights.transports import create_receiver, create_sender
from rayrlhf.weights.transports.shared_memory import _remove_orphans


@pytest.fixture
def sender(request):
    sender = create_sender("shared_memory", f"unit-{request.node.name}")
    yield sender
    sender.close()


def send(sender, index: int, tensor: torch.Tensor) -> tuple[dict, str]:
    header, buffer = pack([("w", tensor)], 3, index, sender.reserve)
    return sender.send(header), fingerprint(header, buffer)


def receive(ticket: dict) -> tuple[torch.Tensor, str]:
    buffer = create_receiver("shared_memory").receive(ticket)
    header = BucketHeader.from_dict(ticket["header"])
    return dict(unpack(header, buffer))["w"], fingerprint(header, buffer)


def test_what_is_sent_arrives_with_the_same_fingerprint(sender):
    weights = torch.randn(33, 7).to(torch.bfloat16)
    ticket, sent = send(sender, 0, weights)
    got, received = receive(ticket)
    assert torch.equal(got, weights)
    assert received == sent


def test_packing_writes_straight_into_the_shared_file(sender):
    ticket, _ = send(sender, 0, torch.tensor([1.0]))
    assert Path(ticket["path"]).read_bytes() == b"\x00\x00\x80\x3f"


def test_the_segment_is_for_its_owner_only(sender):
    ticket, _ = send(sender, 0, torch.zeros(1))
    assert Path(ticket["path"]).stat().st_mode & 0o777 == 0o600


def test_a_receiver_looks_at_the_senders_own_memory_without_a_copy(sender):
    receiver = create_receiver("shared_memory")
    ticket, _ = send(sender, 0, torch.full((9,), 1.0))
    header, got = BucketHeader.from_dict(ticket["header"]), receiver.receive(ticket)
    send(sender, 1, torch.full((9,), 2.0))
    assert dict(unpack(header, got))["w"].tolist() == [1.0] * 9
    third, _ = send(sender, 2, torch.full((9,), 3.0))
    assert third["path"] == ticket["path"]
    assert dict(unpack(header, got))["w"].tolist() == [3.0] * 9


def test_nobody_can_write_through_what_was_received(sender):
    ticket, _ = send(sender, 0, torch.ones(9))
    with open(f"/proc/{os.getpid()}/maps") as maps:
        before = [line for line in maps if ticket["path"] in line]
    kept = create_receiver("shared_memory").receive(ticket)
    with open(f"/proc/{os.getpid()}/maps") as maps:
        new = [line.split()[1] for line in maps if ticket["path"] in line and line not in before]
    assert new == ["r--s"]
    assert kept.numel() > 0


def test_the_next_bucket_does_not_touch_the_one_before(sender):
    first, _ = send(sender, 0, torch.full((9,), 1.0))
    send(sender, 1, torch.full((9,), 2.0))
    assert receive(first)[0].tolist() == [1.0] * 9


def test_segments_grow_and_serve_smaller_buckets_again(sender):
    for index, size in enumerate([3, 3, 5000, 40, 7, 90_000, 90_000, 1]):
        weights = torch.randn(size)
        ticket, sent = send(sender, index, weights)
        got, received = receive(ticket)
        assert torch.equal(got, weights)
        assert received == sent


def test_a_bucket_taken_before_its_segment_grew_stays_whole(sender):
    ticket, _ = send(sender, 0, torch.full((4,), 1.0))
    got = receive(ticket)[0]
    send(sender, 1, torch.zeros(4))
    send(sender, 2, torch.zeros(100_000))
    assert got.tolist() == [1.0] * 4


def test_close_leaves_no_file_behind(sender):
    paths = {send(sender, index, torch.zeros(8))[0]["path"] for index in range(4)}
    assert len(paths) == 2
    assert all(Path(path).exists() for path in paths)
    sender.close()
    assert not any(Path(path).exists() for path in paths)
    sender.close()  # twice is fine


def test_segments_that_no_sender_holds_are_removed_and_live_ones_kept(tmp_path, sender):
    """A killed sender's lock goes with it; a live one's files are locked, in whatever pid namespace it lives."""
    dead = [tmp_path / f"rayrlhf-run-with-dashes-4242-{i}" for i in (0, 1)]
    kept = [tmp_path / "other-run-4242-0", tmp_path / "rayrlhf-notes.txt"]
    for path in [*dead, *kept]:
        path.write_bytes(b"x")
    _remove_orphans(tmp_path)
    assert not any(path.exists() for path in dead)
    assert all(path.exists() for path in kept)
    live = Path(send(sender, 0, torch.zeros(8))[0]["path"])
    _remove_orphans(live.parent)
    assert live.exists()


def test_a_stale_segment_under_the_same_process_id_is_replaced():
    path = Path("/dev/shm") / f"rayrlhf-unit-reused-{os.getpid()}-1"
    path.write_bytes(b"left by a process that had this id before")
    reused = create_sender("shared_memory", "unit-reused")
    try:
        ticket, _ = send(reused, 0, torch.tensor([4.0]))
        assert ticket["path"] == str(path)
        assert receive(ticket)[0].tolist() == [4.0]
    finally:
        reused.close()


@pytest.mark.parametrize("create", [lambda: create_sender("carrier_pigeon", "r"), lambda: create_receiver("nope")])
def test_an_unknown_transport_is_a_config_error_that_lists_the_known_ones(create):
    with pytest.raises(ConfigError, match=r"weights\.transport: no transport '(carrier_pigeon|nope)'") as error:
        create()
    assert "shared_memory" in error.value.hint
