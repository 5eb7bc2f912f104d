"""What a judge said, kept on disk: a file a call, which survives whatever ends the run and serves every other run."""

import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from spin_reg import durable
from spin_reg.fingerprint import digest
from spin_reg.judging import Call

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reply:
    """What a judge said.

    `model`: as it calls itself. `read`, `written`: tokens, as it counts them; None: it does not.
    """

    text: str
    finish_reason: str | None
    model: str | None
    read: int | None
    written: int | None
    host: str
    time: str


class Cache:
    """Answered calls in a folder: a file a call, named by its key; what is damaged is no answer."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def has(self, key: str) -> bool:
        """Whether a call is there; its content is looked at when it is read."""
        return any(self._files(key))

    def read(self, key: str) -> Reply | None:
        """The reply to a call; None where there is none that is whole."""
        for path in self._files(key):
            try:
                return Reply(**durable.read_record(path)["reply"])
            except (OSError, ValueError, TypeError, KeyError) as error:
                log.warning("%s is damaged (%s): the judge is asked again", path, error)
        return None

    def keep(self, call: Call, reply: Reply) -> None:
        """Write a reply, with its request, to the disk."""
        record = {"request": dict(call.body), "repeat": call.repeat, "reply": asdict(reply)}
        path = self._folder / call.key[:2] / f"{call.key}-{digest([record, os.getpid()])[:16]}.json"
        durable.make_folder(path.parent)  # a name of its own: another process may be keeping the same call
        durable.write_record(path, record)

    def _files(self, key: str) -> Iterator[Path]:
        yield from sorted((self._folder / key[:2]).glob(f"{key}-*.json"))
