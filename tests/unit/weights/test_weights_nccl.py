"""The NCCL transport's own part, with a communicator and events that stand in: no GPU is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rayrlhf.errors import WeightSyncError
from rayrlhf.weights.buckets import pack
from rayrlhf.weights.transports import Meeting, nccl

MEETING = Meeting("10.0.0.1", 555, 2, 0)


class Event:
    over = True

    def record(self, stream: Any) -> None: ...

    def query(self) -> bool:
        return self.over


class Stream:
    def wait_stream(self, other: Any) -> None: ...


class Group:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any) -> None:
        self.log.append(f"broadcast {tensor.numel()} from {src}")

    def destroy(self) -> None:
        self.log.append("destroyed")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    from vllm.distributed.weight_transfer import nccl_common

    log, empty = list[str](), torch.empty
    monkeypatch.setattr(torch, "empty", lambda n, dtype, device="cpu": empty(n, dtype=dtype))

    class Cuda:
        def __getattr__(self, name: str) -> Any:
            made = {"Event": Event, "Stream": Stream}
            return made.get(name) or {"current_device": lambda: 0, "current_stream": Stream}[name]

    def met(address: str, port: int, rank: int, world: int, device: Any) -> Group:
        log.append(f"rank {rank} of {world}")
        return Group(log)

    monkeypatch.setattr(nccl, "cuda", Cuda())
    monkeypatch.setattr(nccl_common, "stateless_init_process_group", met)
    monkeypatch.setattr(nccl, "PATIENCE_S", 0.01)
    monkeypatch.setattr(Event, "over", True)
    return log


def send(sender: Any, count: int) -> dict[str, Any]:
    header, _ = pack([("w", torch.ones(count))], 0, 0, sender.reserve)
    ticket: dict[str, Any] = sender.send(header)
    return ticket


def test_a_group_that_meets_anew_lets_the_one_before_go(log: list[str]) -> None:
    sender = nccl.create_sender("run")
    sender.meet(MEETING)
    send(sender, 16)
    sender.meet(Meeting("10.0.0.1", 556, 3, 0))
    assert log == ["rank 0 of 2", "broadcast 64 from 0", "destroyed", "rank 0 of 3"]


def test_a_buffer_is_packed_again_only_when_its_broadcast_is_over(
    log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sender = nccl.create_sender("run")
    sender.meet(MEETING)
    monkeypatch.setattr(Event, "over", False)
    send(sender, 16)
    send(sender, 32)
    with pytest.raises(WeightSyncError, match=r"not over after 0\.01 s"):
        send(sender, 16)
    assert log == ["rank 0 of 2", "broadcast 64 from 0", "broadcast 128 from 0", "destroyed"]


def test_an_engine_that_waits_for_one_that_does_not_come_gives_up_until_it_meets_anew(
    log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver = nccl.create_receiver()
    receiver.meet(MEETING)
    header, _ = pack([("w", torch.ones(16))], 0, 0, lambda n: torch.zeros(n, dtype=torch.uint8))
    ticket = {"header": header.to_dict()}
    assert receiver.receive(ticket).numel() == 64
    monkeypatch.setattr(Event, "over", False)
    with pytest.raises(WeightSyncError, match="not over"):
        receiver.receive(ticket)
    with pytest.raises(WeightSyncError, match="given up"):
        receiver.receive(ticket)
    monkeypatch.setattr(Event, "over", True)
    receiver.meet(MEETING)
    assert receiver.receive(ticket).numel() == 64
