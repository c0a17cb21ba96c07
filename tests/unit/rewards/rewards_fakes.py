"""A reward service on this machine that does to each request whatever the test has told it to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rayrlhf.rewards.base import RewardRequest

Behaviour = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Service

    def do_POST(self) -> None:
        self.asked = self.rfile.read(int(self.headers["Content-Length"]))
        service = self.server
        with service.lock:
            service.bodies.append(json.loads(self.asked))
            service.authorization.append(self.headers.get("Authorization"))
            service.paths.append(self.path)
            service.now += 1
            service.most = max(service.most, service.now)
            behaviour = service.script.pop(0) if len(service.script) > 1 else service.script[0]
        try:
            behaviour(self)
        except OSError:  # the client went away, as it should from a flood
            self.close_connection = True
        finally:
            with service.lock:
                service.now -= 1

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Service(ThreadingHTTPServer):
    """`script`: what it does to each request in turn; the last of them to all that follow."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.script: list[Behaviour] = []
        self.bodies: list[Any] = []
        self.authorization: list[str | None] = []
        self.paths: list[str] = []
        self.now = self.most = 0
        self.written = 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/score"


def requests(count: int) -> list[RewardRequest]:
    """Whose reward, for the services here, is the number in their response."""
    return [RewardRequest(10 + i, (("user", f"prompt {i}"),), f"{i}", i % 2 == 0, "made") for i in range(count)]


# ---- behaviours


def right(handler: Handler) -> None:
    samples = json.loads(handler.asked)["samples"]
    handler.answer(json.dumps({"rewards": [float(sample["response"]) for sample in samples]}).encode())


def says(body: str | bytes, status: int = 200, **headers: str) -> Behaviour:
    sent = body.encode() if isinstance(body, str) else body
    return lambda handler: handler.answer(sent, status, **headers)


def drops(handler: Handler) -> None:
    handler.close_connection = True
    handler.connection.close()


def breaks_off(handler: Handler) -> None:
    """Promises more than it sends."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"rewards": [')
    handler.close_connection = True


def stalls(handler: Handler) -> None:
    time.sleep(3)
    handler.close_connection = True


def drips(handler: Handler) -> None:
    """A byte now and then: each read is soon over, and the answer never."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def floods(handler: Handler) -> None:
    """A body without an end."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    chunk = b"10000\r\n" + b"1" * 0x10000 + b"\r\n"
    for _ in range(4096):  # 256 MiB, if it were let
        handler.wfile.write(chunk)
        handler.server.written += 0x10000
