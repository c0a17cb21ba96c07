"""The head's absence is told once, and its presence never."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress

import pytest

from rayrlhf.actors import head
from rayrlhf.actors.head import HeadWatch


def heard(said: list[str], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while not said and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(said)


def answering(server: socket.socket) -> None:
    """As gRPC's does: with its settings."""
    with suppress(OSError):
        while True:
            connection, _ = server.accept()
            with connection:
                assert connection.recv(64).startswith(b"PRI * HTTP/2.0")
                connection.sendall(bytes(3) + b"\x04" + bytes(5))


def test_a_head_that_hangs_is_told_of_though_the_kernel_accepts_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(head, "ANSWER_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        watch = HeadWatch(said.append, address, every_s=0.02)
        assert heard(said, 5)
        watch.stop()
    assert f"nothing answers at {address} (timed out)" in said[0]


def test_a_head_that_answers_no_more_is_told_of_once_with_the_cure() -> None:
    said: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answering, args=(server,), daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        watch = HeadWatch(said.append, address, every_s=0.02)
        assert not heard(said, 0.3)
        server.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in accept
    assert heard(said, 5)
    watch.stop()
    (text,) = said
    assert f"the Ray head is lost: nothing answers at {address} (Connection refused)" in text
    assert "--resume" in text


def test_some_time_after_a_loss_the_process_is_ended_unless_it_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for a head that hangs waits for ever."""
    ended: list[str] = []
    for end_s, expected in ((0.05, ["by force"]), (60.0, [])):
        monkeypatch.setattr(head, "END_S", end_s)
        said: list[str] = []
        watch = HeadWatch(said.append, "127.0.0.1:9", every_s=0.01, end=lambda: ended.append("by force"))
        assert heard(said, 5)
        heard(ended, 0.5)
        watch.stop()
        assert ended == expected
        ended.clear()


def test_a_watch_that_is_stopped_says_nothing() -> None:
    said: list[str] = []
    watch = HeadWatch(said.append, "127.0.0.1:9", every_s=0.2)
    watch.stop()
    assert not heard(said, 0.5)
