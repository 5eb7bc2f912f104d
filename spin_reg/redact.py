"""Secrets never leave the process: credentials in URLs, and the values of environment variables named like secrets."""

import os
import re

MASK = "***"
NAMES = ("KEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL")
SHORTEST = 8  # a shorter value stands in ordinary words too
USERINFO = re.compile(r"(?<=://)[^\s/?#'\"<>]+(?=@)")
QUERY = re.compile(
    r"(?<=[?&;])([\w.-]*(?:token|key|secret|signature|password|passwd|credential)[\w.-]*=)([^\s&#;'\"<>]+)", re.I
)


def redacted(text: str) -> str:
    """The text with `***` for every secret in it: user info and secret query parameters of URLs, and the values of
    environment variables whose names say that they are secret."""
    for value in sorted(_held(), key=len, reverse=True):
        text = text.replace(value, MASK)
    return QUERY.sub(rf"\1{MASK}", USERINFO.sub(MASK, text))


def found(text: str) -> str | None:
    """What secret the text holds, told without it; None where it holds none."""
    for value, name in _held().items():
        if value in text:
            return f"the value of the environment variable {name}"
    return "credentials in a URL" if USERINFO.search(text) or QUERY.search(text) else None


def named_secret(name: str) -> bool:
    """Whether an environment variable of this name is taken to hold a secret."""
    return any(word in name.upper() for word in NAMES)


def _held() -> dict[str, str]:
    """The secrets in the environment, each with the variable that holds it."""
    held: dict[str, str] = {}
    for name, value in os.environ.items():
        secrets = [value] if named_secret(name) else []
        for user in USERINFO.findall(value):
            secrets += [user, user.rpartition(":")[2]]
        held |= {secret: name for secret in secrets if len(secret) >= SHORTEST and not _is_path(secret)}
    return held


def _is_path(value: str) -> bool:
    """A variable such as GOOGLE_APPLICATION_CREDENTIALS says where a secret lies, which is none."""
    return os.path.isabs(value) and os.path.exists(value)
