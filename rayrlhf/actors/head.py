"""A watch on the Ray head: without it Ray ends the run by itself within a minute, and not in words that help."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

import ray

__all__ = ["HeadWatch"]

EVERY_S, ANSWER_S = 2.0, 2.0
# How HTTP/2 begins (RFC 9113, section 3.4), and an empty frame of settings: what gRPC's server speaks, and answers.
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
# A head that is only slow to accept is not gone.
MISSED = 3


class HeadWatch:
    """Knocks at the head's server from a thread of its own, until `stop`."""

    def __init__(self, say: Callable[[str], None], address: str | None = None, every_s: float = EVERY_S) -> None:
        """`say` is called once, when nobody answers any more; `address`: of the Ray that was joined, if left out."""
        self._say, self._every_s = say, every_s
        self._address = address or ray.get_runtime_context().gcs_address
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="head watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        host, _, port = self._address.rpartition(":")
        missed = 0
        while missed < MISSED:
            if self._over.wait(self._every_s):
                return
            try:
                _knock(host.strip("[]"), int(port))
                missed = 0
            except OSError as error:
                missed, reason = missed + 1, error.strerror or str(error)
        self._say(
            f"the Ray head is lost: nothing answers at {self._address} ({reason}); Ray ends this run within a minute. "
            "What it has learned since the newest checkpoint is lost. See gcs_server.out in the logs of Ray's session. "
            "Start a head if it was not this run's own, then go on with --resume"
        )


def _knock(host: str, port: int) -> None:
    """Raises OSError unless somebody answers: for a server that hangs the kernel still accepts. Any answer will do."""
    with socket.create_connection((host, port), timeout=ANSWER_S) as connection:
        connection.sendall(GREETING)
        connection.recv(1)
