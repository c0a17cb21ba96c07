"""A watch on the Ray head: without it Ray ends the run by itself within a minute, and not in words that help, or, where
the head hangs, the run waits for it and says nothing at all."""

from __future__ import annotations

import faulthandler
import os
import socket
import threading
from collections.abc import Callable

import ray

from rayrlhf.actors.cluster import end_own_ray

__all__ = ["HeadWatch"]

EVERY_S, ANSWER_S = 2.0, 5.0
# How HTTP/2 begins (RFC 9113, section 3.4), and an empty frame of settings: what gRPC's server speaks, and answers.
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
# A head that is only slow to answer is not gone.
MISSED = 3
# From the loss to the end of this process, by force: a call of Ray's that waits for a head that hangs never comes back.
# Ray itself gives up a head that is gone after 60 s.
END_S, LATER_S = 45.0, 5.0


class HeadWatch:
    """Knocks at the head's server from a thread of its own, until `stop`."""

    def __init__(
        self,
        lost: Callable[[str], None],
        address: str | None = None,
        every_s: float = EVERY_S,
        end: Callable[[], None] | None = None,
    ) -> None:
        """`lost` is told once, when nobody answers any more; some time after that, `end` ends this process.

        Args:
            address: of the Ray that was joined, if left out.
        """
        self._lost, self._every_s, self._end = lost, every_s, end or _end
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
        self._lost(
            f"the Ray head is lost: nothing answers at {self._address} ({reason}); this run ends within a minute. PPO "
            "saves a checkpoint first, if its learners still answer. See gcs_server.out in the logs of Ray's session. "
            "Start a head if it was not this run's own, then go on with --resume"
        )
        if not self._over.wait(END_S):
            self._end()


def _end() -> None:
    # Even where Python itself stands still.
    faulthandler.dump_traceback_later(LATER_S, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115
    end_own_ray()
    os._exit(1)


def _knock(host: str, port: int) -> None:
    """Raises OSError unless somebody answers: for a server that hangs the kernel still accepts. Any answer will do."""
    with socket.create_connection((host, port), timeout=ANSWER_S) as connection:
        connection.sendall(GREETING)
        connection.recv(1)
