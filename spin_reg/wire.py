"""What processes that make a stage tell the one that started them: JSON lines over a socket of the local machine.

Both ends notice when the other is gone. A worker then ends at once; it has nothing to lose that is not on disk.
"""

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spin_reg.errors import SpinRegError

NAME = "wire"  # of the socket, beside the job's file
Message = dict[str, Any]


@dataclass
class Peer:
    """A worker as it is known here: its rank and process id once it has said them; `done`: it has said its last.

    `asked`: it has been told of a signal.
    """

    connection: socket.socket
    rest: bytes = b""
    rank: int = -1
    pid: int = 0
    done: bool = False
    asked: bool = False


class Board:
    """Where the workers of one stage are heard. It never waits: who owns it comes again and again.

    Attributes:
        lost: ranks that went without their last word.
    """

    def __init__(self, path: Path) -> None:
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._server.bind(str(path))
        except OSError as error:
            raise SpinRegError(
                "Processes of a stage cannot be heard.",
                where=str(path),
                why=f"a socket of that name cannot be made ({error})",
                todo="have TMPDIR name a local folder with a short path",
            ) from error
        self._server.listen()
        self._server.setblocking(False)
        self._peers: list[Peer] = []
        self.lost: list[int] = []

    def heard(self) -> Iterator[tuple[Peer, Message]]:
        """What has been said since the last call."""
        with suppress(BlockingIOError):
            while True:
                connection, _ = self._server.accept()
                connection.setblocking(False)
                self._peers.append(Peer(connection))
        for peer in list(self._peers):
            gone = self._read(peer)
            *whole, peer.rest = peer.rest.split(b"\n")
            for message in map(json.loads, whole):
                if "hello" in message:
                    peer.rank, peer.pid = message["hello"]
                peer.done |= bool({"done", "error", "failed"} & set(message))
                yield peer, message
            if gone:
                self._peers.remove(peer)
                peer.connection.close()
                self.lost += [] if peer.done else [peer.rank]

    def _read(self, peer: Peer) -> bool:
        """Take what has come; whether the other end is gone."""
        try:
            while part := peer.connection.recv(1 << 16):
                peer.rest += part
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def ask(self, number: int) -> None:
        """Have every worker that is heard by now hear a signal, once: who is still to come does so at a later call."""
        for peer in (peer for peer in self._peers if not peer.asked):
            peer.asked = True
            with suppress(OSError):
                peer.connection.sendall(json.dumps({"signal": number}).encode() + b"\n")

    def kill(self) -> None:
        """End every worker that is still there, at once."""
        for peer in list(self._peers):
            if peer.pid:
                with suppress(OSError):
                    os.kill(peer.pid, signal.SIGKILL)

    def close(self) -> None:
        """A worker that is still there ends of it."""
        for peer in self._peers:
            peer.connection.close()
        self._server.close()


class Line:
    """A worker's end: what it says is on its way when `say` returns; a signal it is told of comes as one of its own."""

    def __init__(self, path: Path, rank: int) -> None:
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(str(path))
        threading.Thread(target=self._listen, name="wire", daemon=True).start()
        self.say(hello=[rank, os.getpid()])

    def say(self, **message: Any) -> None:
        text = json.dumps(message).encode() + b"\n"
        with self._lock:
            try:
                self._socket.sendall(text)
            except OSError:
                _alone()

    def _listen(self) -> None:
        rest = b""
        while True:
            try:
                part = self._socket.recv(1 << 12)
            except OSError:
                part = b""
            if not part:
                _alone()
            *whole, rest = (rest + part).split(b"\n")
            for line in whole:
                os.kill(os.getpid(), json.loads(line)["signal"])


def _alone() -> None:
    os._exit(1)  # nobody is there to be told


@contextmanager
def board(path: Path) -> Iterator[Board]:
    """A board for as long as the block runs."""
    made = Board(path)
    try:
        yield made
    finally:
        made.close()
