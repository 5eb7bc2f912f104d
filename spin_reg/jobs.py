"""A stage as text: what a process of its own is given, written as JSON and built again, exactly, by the types that its
fields are annotated with. No pickle: text makes none but the dataclasses that those annotations name.
"""

import dataclasses
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from spin_reg.specs import Spec

KIND = "is"  # the class of a dataclass: an annotation may name what several are kinds of


@dataclass(frozen=True)
class Job:
    """A stage to be run.

    Attributes:
        name: for people. inputs: the folders it reads, by role. out: the one it writes into.
        threads: of one process. processes: how many work on it together.
    """

    name: str
    spec: Spec
    inputs: Mapping[str, str]
    out: str
    threads: int
    processes: int = 1


def written(value: Any) -> Any:
    """A value of dataclasses, enums, tuples, lists, dicts and plain values as JSON values; `read` builds it again.

    Raises:
        TypeError: it has something else in it.
    """
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: written(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {KIND: type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {_text(key): written(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [written(entry) for entry in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"{type(value).__name__} cannot be written")


def read(hint: Any, value: Any) -> Any:
    """The value of that type which `written` wrote.

    Raises:
        TypeError: it is no value of that type.
    """
    if hint is Any:
        return value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        kind = _kinds(hint).get(value[KIND])
        if kind is None:
            raise TypeError(f"{value[KIND]} is no {hint.__name__}")
        return kind(**{name: read(of, value[name]) for name, of in _fields(kind).items()})
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _one_of(parts, value)
    if origin is tuple:
        each = parts[:1] * len(value) if parts[1:] == (...,) else parts
        return tuple(read(part, entry) for part, entry in zip(each, value, strict=True))
    if origin in (list, Sequence):
        return [read(parts[0], entry) for entry in value]
    if origin in (dict, Mapping):
        return {key: read(parts[1], entry) for key, entry in value.items()}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(value)
    wanted = (int, float) if hint is float else hint
    if not isinstance(value, wanted) or (isinstance(value, bool) and hint is not bool):
        raise TypeError(f"{value!r} is no {hint.__name__}")
    return value


def _one_of(parts: tuple[Any, ...], value: Any) -> Any:
    """A value of one of several types: they differ in whether it is null, or in its class."""
    if value is None and type(None) in parts:
        return None
    fitting = [part for part in parts if part is not type(None)]
    if len(fitting) > 1:
        fitting = [part for part in fitting if value[KIND] in _kinds(part)]
    if not fitting:
        raise TypeError(f"{value!r} is none of {parts}")
    return read(fitting[0], value)


def _text(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"a mapping by {type(key).__name__} would come back as one by text")
    return key


@cache
def _kinds(hint: Any) -> dict[str, type]:
    """A dataclass and those derived from it, by name."""
    found: dict[str, type] = {hint.__name__: hint}
    for derived in hint.__subclasses__():
        found |= _kinds(derived)
    return found


@cache
def _fields(kind: type) -> dict[str, Any]:
    """The annotations of a dataclass's fields."""
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}
