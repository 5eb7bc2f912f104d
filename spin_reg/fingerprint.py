"""Identity of values and keyed randomness: canonical JSON, SHA-256, and draws that depend on nothing but their key."""

import dataclasses
import hashlib
import json
import math
from enum import Enum
from pathlib import Path
from typing import Any

PLAIN = {str, int, bool, type(None)}  # what most values are: they are their own JSON values


def plain(value: Any) -> Any:
    """Turn dataclasses, enums, tuples and paths into JSON values; refuse what has no stable text."""
    if type(value) in PLAIN:
        return value
    if isinstance(value, Enum):
        return plain(value.value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} cannot be part of an identity: it has no JSON text")
    if isinstance(value, str | int | float):
        return value
    raise TypeError(f"{type(value).__name__} has no stable text, so it cannot be part of an identity")


def identity(value: Any, *, places: bool = False) -> Any:
    """`plain`, without the dataclass fields marked `metadata={"runtime": True}`: those do not change results.

    Nor are fields marked `later` a part of it while they are at their default: they came after it; nor those marked
    `place`, unless `places` are asked for: what lies there has a hash.
    """
    if type(value) in PLAIN:
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        left_out = {"runtime"} if places else {"runtime", "place"}
        named = ((f, getattr(value, f.name)) for f in dataclasses.fields(value) if left_out.isdisjoint(f.metadata))
        return {f.name: identity(v, places=places) for f, v in named if not ("later" in f.metadata and v == f.default)}
    if isinstance(value, list | tuple):
        return [identity(v, places=places) for v in value]
    if isinstance(value, dict):
        return {str(k): identity(v, places=places) for k, v in value.items()}
    return plain(value)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict as {dotted key: leaf}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def canonical(value: Any) -> str:
    """One text for one value: sorted keys, no spaces, no NaN."""
    return _text(plain(value))


def _text(plain_value: Any) -> str:
    return json.dumps(plain_value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256 (hex) of the canonical text of a value."""
    return _hashed(canonical(value))


def digest_identity(value: Any) -> str:
    """SHA-256 (hex) of the canonical text of a value's `identity`."""
    return _hashed(_text(identity(value)))


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def seed_of(*key: str | int) -> int:
    """A 128-bit integer that depends only on the key, for seeding a generator of one's own."""
    return int(digest(list(key))[:32], 16)


def uniform(*key: str | int) -> float:
    """One draw from [0, 1) that depends only on the key (53 bits)."""
    return (int(digest(list(key))[:16], 16) >> 11) / (1 << 53)


def order(keys: list[list[str | int]]) -> list[int]:
    """Positions in the order of the digests of their keys: a permutation that does not depend on where a row stood."""
    return sorted(range(len(keys)), key=lambda i: digest(keys[i]))
