"""A judge over real HTTP on loopback, which answers as it is told to, or misbehaves."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Say = Callable[[dict[str, Any]], str]


@dataclass
class Judge:
    """What it says is `say(request)`. `faults`: how it misbehaves at the next calls, one each, before it behaves.

    `seen`: the requests that came, with their headers.
    """

    say: Say = lambda request: "Fine. Grade: [[7]]"
    faults: list[str] = field(default_factory=list)
    seen: list[tuple[dict[str, Any], dict[str, str]]] = field(default_factory=list)
    usage: bool = True
    model: str = "judge-as-served"
    delay: float = 0.0
    base_url: str = ""
    busy: int = 0
    busiest: int = 0
    lock: Any = field(default_factory=threading.Lock)

    @property
    def requests(self) -> list[dict[str, Any]]:
        return [request for request, _ in self.seen]


@contextmanager
def serving(judge: Judge) -> Iterator[Judge]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            """Say nothing."""

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with judge.lock:
                judge.seen.append((json.loads(body) | {"path": self.path}, dict(self.headers)))
                judge.busy += 1
                judge.busiest = max(judge.busiest, judge.busy)
                fault = judge.faults.pop(0) if judge.faults else ""
            try:
                time.sleep(judge.delay)
                self._answer(json.loads(body), fault)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the caller has gone
            finally:
                with judge.lock:
                    judge.busy -= 1

        def _answer(self, request: dict[str, Any], fault: str) -> None:
            if fault.isdigit():
                self._send(int(fault), f'{{"error": "no, because of {self.headers["Authorization"]}"}}'.encode())
            elif fault.startswith("wait"):
                self._send(429, b"later", {"Retry-After": fault.removeprefix("wait ")})
            elif fault == "slow":
                time.sleep(1.0)
            elif fault == "cut":
                self._send(200, b'{"choices": [', {"Content-Length": "400"})
            elif fault == "drop":
                self.connection.close()
            elif fault.startswith("raw "):
                self._send(200, fault.removeprefix("raw ").encode())
            else:
                found: dict[str, Any] = {"model": judge.model, "object": "chat.completion"}
                message = {"role": "assistant", "content": judge.say(request)}
                found["choices"] = [{"index": 0, "message": message, "finish_reason": "stop"}]
                if judge.usage:
                    found["usage"] = {"prompt_tokens": 100, "completion_tokens": 10}
                self._send(200, json.dumps(found).encode())

        def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

    class Server(ThreadingHTTPServer):
        request_queue_size = 64
        daemon_threads = True

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    judge.base_url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
