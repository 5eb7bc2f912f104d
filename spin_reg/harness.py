"""lm-eval as it is installed: its version, and what its tasks and those of the user are made of; nothing is imported.

A task is a YAML file (with files that it includes, and Python beside it that it names), a group lists tasks, a tag is a
mark that tasks bear. Read as lm-eval reads them, without running what they name.
"""

import difflib
import glob
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from spin_reg import sources
from spin_reg.benchmarks import Evaluation, TaskFiles
from spin_reg.errors import ConfigError
from spin_reg.fingerprint import digest, file_sha256

OLDEST = (0, 4, 10)  # the first that goes with transformers 5
EXTRA = "pip install spin-reg[eval]"
FILES = {"json", "csv", "parquet", "text", "arrow"}  # readers of data files, in the place of a data set's name
INCLUDE = re.compile(rb"^[\"']?include[\"']?[ \t]*:[ \t]*[\"']?([^\s\"'#\[]+)", re.M)
DEEPEST = 8  # includes within includes
Config = dict[str, Any]


def version() -> str | None:
    """The version of lm-eval that is installed; None where it is not."""
    try:
        return metadata.version("lm_eval") if find_spec("lm_eval") is not None else None
    except metadata.PackageNotFoundError:
        return None


def check() -> None:
    """Raise ConfigError where lm-eval is missing or too old."""
    found, oldest = version(), ".".join(map(str, OLDEST))
    if found is None:
        raise ConfigError(
            "lm-eval is not installed.",
            where="evaluation.benchmarks",
            why="benchmarks are run by the package lm-eval, which is an extra",
            todo=f"{EXTRA}, or leave the benchmarks out",
        )
    if tuple(int(part) for part in re.findall(r"\d+", found)[:3]) < OLDEST:
        why, todo = f"{found} is installed, and {oldest} is the oldest that is known to work", f"{EXTRA} --upgrade"
        raise ConfigError("lm-eval is too old.", where="evaluation.benchmarks", why=why, todo=todo)


def tasks(asked: Evaluation, recorded: Mapping[str, str]) -> dict[str, TaskFiles]:
    """What each benchmark is by content.

    Args:
        recorded: SHA-256 by name, as they were; they count for lm-eval's own tasks where it is not installed.

    Raises:
        ConfigError: nobody has a task of this name; its data file is missing; `evaluation.include_path` has no effect.
    """
    names = [benchmark.task for benchmark in asked.benchmarks]
    if not names:
        return {}
    library, installed = _library(asked.include_path), find_spec("lm_eval") is not None
    found: dict[str, TaskFiles] = {}
    for name in names:
        if library.has(name):
            found[name] = library.files(name)
        elif installed:
            raise _unknown(name, library, asked.include_path)
        else:
            found[name] = TaskFiles(recorded.get(name))
    if asked.include_path is not None and not any(label == "include_path" for label in library.opened):
        why = f"none of {', '.join(names)} lies in it, so it has no effect"
        where = f"evaluation.include_path={asked.include_path}"
        raise ConfigError("This folder has none of the tasks.", where=where, why=why, todo="leave it out, or name them")
    return found


def as_it_is(name: str, include_path: str | None) -> TaskFiles:
    """What a benchmark that is there is by content now."""
    return _library(include_path).files(name)


def _library(include_path: str | None) -> "_Library":
    """The user's tasks, and those of lm-eval where it is installed."""
    own = [] if include_path is None else [_Shelf(_folder(include_path), "include_path")]
    package = find_spec("lm_eval")
    places = [] if package is None else package.submodule_search_locations or ()
    return _Library([*own, *(_Shelf(Path(place) / "tasks", "lm_eval") for place in places)])


def _folder(path: str) -> Path:
    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        where, todo = f"evaluation.include_path={path}", "give the folder that holds your tasks' YAML files"
        raise ConfigError("This is no folder of tasks.", where=where, why="no such folder", todo=todo)
    return folder


def _unknown(name: str, library: "_Library", include_path: str | None) -> ConfigError:
    near = difflib.get_close_matches(name, library.names(), n=3)
    places = f"lm-eval {version()}" + (f" and {include_path} have" if include_path else " has")
    return ConfigError(
        f"There is no benchmark {name}.",
        where="evaluation.benchmarks",
        why=f"{places} no task, group or tag of this name",
        todo=f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists them",
    )


@dataclass(frozen=True)
class _Entry:
    """One YAML file as lm-eval sees it: its settings, those of its includes below them, and all these files."""

    config: Config
    path: Path
    read: tuple[Path, ...]

    @property
    def name(self) -> str:
        kind = "group" if "group" in self.config and "class" not in self.config else "task"
        return str(self.config.get(kind))

    @property
    def tags(self) -> list[str]:
        tags = self.config.get("tag") if "group" not in self.config else None
        return [tags] if isinstance(tags, str) else list(tags or ())


@dataclass
class _Shelf:
    """A folder of task files. lm-eval's own has many thousands: only those that mention a name are parsed, at first."""

    root: Path
    label: str
    parsed: dict[Path, _Entry | None] = field(default_factory=dict)

    @cached_property
    def texts(self) -> dict[Path, bytes]:
        """The YAML files, each with the texts of its includes behind its own."""
        read: dict[str, bytes] = {}

        def text(path: str, depth: int = 0) -> bytes:
            if path not in read:
                with suppress(OSError):
                    read[path] = Path(path).read_bytes()
            own = read.get(path, b"")
            includes = INCLUDE.findall(own) if depth < DEEPEST else []
            folder = os.path.dirname(path)
            return b"\n".join([own, *(text(os.path.join(folder, os.fsdecode(name)), depth + 1) for name in includes)])

        paths = (p for p in self.root.glob("**/*.yaml") if not {"__pycache__", ".ipynb_checkpoints"} & set(p.parts))
        return {path: text(str(path)) for path in sorted(paths, key=Path.as_posix)}

    def find(self, name: str) -> list[_Entry]:
        """The task or group of this name, or the tasks that bear it as a tag."""
        word = name.encode()
        alone = rb"(?<![\w.-])%b(?![\w.-])" % re.escape(word)
        says = re.compile(rb"^(?:[\"']?(?:task|group|tag)\b|[ \t]*-[ \t]).*%b" % alone, re.M)
        likely = [path for path, text in self.texts.items() if word in text and says.search(text)]
        for paths in (likely, list(self.texts)):
            entries = [entry for entry in map(self.entry, paths) if entry is not None]
            named = [entry for entry in entries if entry.name == name]
            tagged = [entry for entry in entries if name in entry.tags]
            if named or tagged:
                return named[:1] or tagged
        return []

    def entry(self, path: Path) -> _Entry | None:
        """A file parsed, None where it is neither task nor group, or cannot be read: lm-eval passes those by too."""
        if path not in self.parsed:
            try:
                config, read = _read(path, ())
                shaped = bool({"task", "group"} & set(config))
                self.parsed[path] = _Entry(config, path, tuple(read)) if shaped else None
            except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError, RecursionError):
                self.parsed[path] = None
        return self.parsed[path]


def _read(path: Path, above: Sequence[Path]) -> tuple[Config, list[Path]]:
    """A YAML file over what it includes, and the files that were read."""
    path = path.resolve()
    if path in above:
        raise ValueError(f"{path} includes itself")
    config = yaml.load(path.read_bytes(), Loader=_SafeLoader)
    merged: Config = {}
    files = [path]
    includes = config.pop("include", [])
    for name in includes if isinstance(includes, list) else [includes]:
        below, read = _read(path.parent / name, (*above, path))
        below.pop("task_list", None)
        merged |= below
        files += read
    return merged | config, files


_SafeLoader: Any = type("Loader", (getattr(yaml, "CSafeLoader", yaml.SafeLoader),), {})
yaml.add_multi_constructor(
    "!", lambda loader, suffix, node: str(node.value), Loader=_SafeLoader
)  # `!function` names one


class _Library:
    """The user's folder before lm-eval's own. `opened`: the labels of the shelves that tasks were found on."""

    def __init__(self, shelves: Sequence[_Shelf]) -> None:
        self._shelves, self.opened = shelves, set[str]()
        self._found: dict[str, tuple[_Shelf, list[_Entry]] | None] = {}

    def names(self) -> list[str]:
        """Names that stand in the files, for naming the nearest."""
        says = re.compile(rb"^[\"']?(?:task|group|tag)[\"']?[ \t]*:[ \t]*[\"']?([\w.+()-]+)", re.M)
        texts = (text for shelf in self._shelves for text in shelf.texts.values())
        return sorted({match.decode(errors="replace") for text in texts for match in says.findall(text)})

    def has(self, name: str) -> bool:
        return self._lookup(name) is not None

    def _lookup(self, name: str) -> tuple[_Shelf, list[_Entry]] | None:
        if name not in self._found:
            found = ((shelf, entries) for shelf in self._shelves if (entries := shelf.find(name)))
            self._found[name] = next(found, None)
        return self._found[name]

    def files(self, name: str) -> TaskFiles:
        """All that a task, or the tasks of a group or a tag, are made of."""
        hashes: dict[str, str] = {}
        local, seen = True, set[str]()
        for shelf, entry in self._entries(name, seen):
            self.opened.add(shelf.label)
            code = (
                path for read in entry.read for path in read.parent.glob("*.py")
            )  # `!function` looks beside its file
            for path in {*entry.read, *code}:
                inside = path.is_relative_to(shelf.root)
                name_ = path.relative_to(shelf.root).as_posix() if inside else path.name
                hashes[f"{shelf.label}/{name_}"] = file_sha256(path)
            if "group" in entry.config:
                continue
            hashes |= {f"{entry.name}: {label}": sha256 for label, sha256 in _data(entry)}
            local = local and _is_local(entry.config)
        return TaskFiles(digest(hashes), local and all(map(self.has, seen)))

    def _entries(self, name: str, seen: set[str]) -> Iterator[tuple[_Shelf, _Entry]]:
        found = self._lookup(name)
        if name in seen:
            return
        seen.add(name)
        shelf, entries = found or (None, [])
        for entry in entries:
            assert shelf is not None
            yield shelf, entry
            if "group" in entry.config:
                for child in _children(entry.config.get("task")):
                    yield from self._entries(child, seen)


def _children(listed: Any) -> Iterator[str]:
    """The names in a group's list, which may hold settings, and groups written out."""
    for item in listed if isinstance(listed, list) else [listed]:
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            yield from filter(lambda name: isinstance(name, str), [item.get("group")])
            yield from _children(item.get("task"))


def _data_files(config: Config) -> list[str]:
    """The data files that a task names."""
    named = (config.get("dataset_kwargs") or {}).get("data_files") or []
    parts = named.values() if isinstance(named, dict) else [named]
    return [str(name) for part in parts for name in (part if isinstance(part, list) else [part])]


def _is_local(config: Config) -> bool:
    """Whether a task reads its data from this machine's files, as far as its YAML says."""
    if "class" in config or "custom_dataset" in config or "dataset_path" not in config:
        return False
    path, files = str(config["dataset_path"]), _data_files(config)
    return (path in FILES and bool(files) or Path(path).expanduser().is_dir()) and not any("://" in f for f in files)


def _data(entry: _Entry) -> Iterable[tuple[str, str]]:
    """Names and SHA-256 of a task's data, where they are files of this machine (relative to where the run began)."""
    if not _is_local(entry.config):
        return
    folder = Path(str(entry.config["dataset_path"])).expanduser()
    if folder.is_dir():
        yield folder.name, sources.folder_sha256(folder)
    for i, name in enumerate(_data_files(entry.config)):
        pattern = str(folder / name) if folder.is_dir() else str(Path(name).expanduser())
        paths = sorted(Path(path) for path in glob.glob(pattern, recursive=True) if Path(path).is_file())
        if not paths:
            why = f"its data file {name} is not there"
            raise ConfigError(
                "A benchmark has no data.", where=str(entry.path), why=why, todo="put it there, or name another"
            )
        yield from ((f"{i} {j} {path.name}", file_sha256(path)) for j, path in enumerate(paths))
