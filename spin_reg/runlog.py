"""The log of a run: a file of its own, without secrets, that no full disk can turn into a failure."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from spin_reg import durable
from spin_reg.redact import redacted


class _Redacting(logging.Formatter):
    """Lines and tracebacks without the secrets in them."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


class _RunLog(logging.FileHandler):
    """A log that a full disk cannot turn into a failure, nor a failure into another one."""

    def handleError(self, record: logging.LogRecord) -> None:
        """What cannot be written is left out."""

    def close(self) -> None:
        with suppress(OSError):  # what is left in the buffer
            super().close()


@contextmanager
def kept(path: Path) -> Iterator[None]:
    """Everything logged below `spin_reg` goes to this file while the run is open."""
    with durable.disk_errors(path):
        handler = _RunLog(path, encoding="utf-8")
    handler.setFormatter(_Redacting("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("spin_reg")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
