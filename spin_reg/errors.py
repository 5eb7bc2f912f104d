"""Errors as people read them: what happened, where, why, and what to do; each kind has its exit code."""


class SpinRegError(Exception):
    """A failure with four parts; the command prints them as four lines and exits with `exit_code`."""

    exit_code = 1

    def __init__(self, what: str, *, where: str, why: str, todo: str) -> None:
        super().__init__(what)
        self.what, self.where, self.why, self.todo = what, where, why, todo

    def __str__(self) -> str:
        return f"{self.what}\n  where: {self.where}\n  why:   {self.why}\n  to do: {self.todo}"


def told(error: SpinRegError) -> dict[str, str]:
    """An error as another process is told of it; `heard` makes it again."""
    parts = {"what": error.what, "where": error.where, "why": error.why, "todo": error.todo}
    return {"kind": type(error).__name__, **parts}


def heard(parts: dict[str, str]) -> SpinRegError:
    """The error that another process told of."""
    known: list[type[SpinRegError]] = [SpinRegError, *SpinRegError.__subclasses__()]
    kinds = {kind.__name__: kind for kind in known}
    kind = kinds[parts["kind"]]
    return kind(parts["what"], where=parts["where"], why=parts["why"], todo=parts["todo"])


class ConfigError(SpinRegError):
    """A setting that is unknown, out of range, without effect, or at odds with an existing run."""

    exit_code = 2


class DataError(SpinRegError):
    """Input data that cannot be used; rows are counted from 1."""

    exit_code = 3


class RunBusy(SpinRegError):
    """Another process owns the run folder."""

    exit_code = 4


class NonFiniteError(SpinRegError):
    """A NaN or an infinity in a loss, a gradient or a log-prob."""

    exit_code = 5


class NoSpace(SpinRegError):
    """The disk has no room for what is to be written."""

    exit_code = 6


class Stopped(SpinRegError):
    """A signal asked the run to stop; the same command goes on from here."""

    exit_code = 75


class DamagedError(SpinRegError):
    """A file of a finished stage is missing, truncated or altered."""


class SelfCheckError(SpinRegError):
    """Two numbers that must be equal by the mathematics are not."""
