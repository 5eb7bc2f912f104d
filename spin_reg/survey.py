"""How far a run is, read off its folder alone, whoever is working on it; and the family of its iterates."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spin_reg import durable, opponents, pace, rundir
from spin_reg.errors import DamagedError
from spin_reg.pace import Piece

PREPARED = "prepared"  # in run.json, as long as its data alone were asked for
PLAN = ".plan.json"  # what `status` knows of the stages to come; nothing else is read from it
LOG, STOPPED = "run.log", "stopped.json"
TAIL = 1 << 16  # bytes of a log that hold how its last call ended
ENDED = re.compile(r" spin_reg\.launch: (?:the run ended early: (\w+): (.*)|only its data were asked for)$", flags=re.M)
BEGUN = re.compile(r": (\S+): todo \(", flags=re.M)
AT = re.compile(r": (\S+): at (\{.*\})$", flags=re.M)
TAKEN = re.compile(r": (\S+): taken from (.+)$", flags=re.M)


@dataclass(frozen=True)
class Seen:
    """A run as it stands; None is what is not known.

    Attributes:
        state: running, finished, prepared (its data were made for a plan, and no more), stopped (by a signal), failed,
            interrupted (it ended without a word), or damaged.
        iterates: how many are made, the base included. iterations: how many are to be played.
        stage: the one at work, or begun. done, total, unit: how far it is. rate: units a second.
        stages_done, stages_total: of the plan. seconds_left: of the whole run, at the pace so far, without the kinds of
            stages `not_timed` yet.
        disk: bytes; shared: of those, in files that other runs hold too. owner: who is at work.
        heldout_nll: of every iterate that was evaluated, by its number.
    """

    run: str
    path: str
    state: str
    began: str | None = None
    iterates: int = 0
    iterations: int | None = None
    stage: str | None = None
    done: int | None = None
    total: int | None = None
    unit: str | None = None
    rate: float | None = None
    stages_done: int = 0
    stages_total: int | None = None
    seconds_left: float | None = None
    not_timed: tuple[str, ...] = ()
    error: str | None = None
    disk: int = 0
    shared: int = 0
    owner: str | None = None
    heldout_nll: Mapping[int, float] | None = None


@dataclass(frozen=True)
class Member:
    """An iterate in the family tree.

    Attributes:
        parent: the iterate that it was trained from; None of the base, whose `made` says where it comes from.
        answers: who answered what it was trained on, with their shares. kept: answers from before stay where they can.
        reference: the formula of log r. reused: the stages taken over from other runs, by the run.
    """

    iterate: int
    made: str
    parent: int | None
    answers: Mapping[int, float]
    kept: bool
    reference: str | None
    heldout_nll: float | None
    reused: Mapping[str, Sequence[str]]


def record(root: Path, pieces: Sequence[Piece]) -> None:
    """Write down the stages of a run's plan for who looks on."""
    content = (json.dumps([asdict(piece) for piece in pieces]) + "\n").encode()
    path = root / PLAN
    if not path.is_file() or path.read_bytes() != content:
        durable.write_bytes(path, content)


def roots(folder: Path) -> list[Path]:
    """The run that this folder is, or the runs that lie in it, by name."""
    return [folder] if (folder / rundir.RUN).exists() else sorted(p.parent for p in folder.glob(f"*/{rundir.RUN}"))


def look(root: Path) -> Seen:
    """A run as it stands; a damaged one says so in its `error`."""
    root = root.resolve()
    files = _files(root)
    try:
        saved = rundir.provenance(root)
        why = "it has just been removed"
    except DamagedError as error:
        saved, why = None, error.why
    if saved is None:
        said = f"{root / rundir.RUN}: {why}"
        return Seen(root.name, str(root), "damaged", error=said, disk=files.disk, shared=files.shared)
    pieces = _pieces(root)
    todo = {piece.name for piece in pieces or () if piece.folder not in files.made}
    iterates = sum(re.fullmatch(r"iterate-\d+(/model)?", folder) is not None for folder in files.made)
    over = (root / STOPPED).exists() or (not todo if pieces else iterates > saved["iterations"])
    owner = _owner(root)
    text = _log(root, TAIL if over and owner is None else None)
    state, ended = ("running", None) if owner else ("finished", None) if over else _end(text, PREPARED in saved)
    left = pace.left(pieces, todo, text) if pieces and state != "finished" else None
    return Seen(
        root.name,
        str(root),
        state,
        began=saved["created"],
        iterates=iterates,
        iterations=saved["iterations"],
        **(_work(text, files.begun) if state != "finished" else {}),
        stages_done=len(pieces) - len(todo) if pieces else len(files.made),
        stages_total=len(pieces) if pieces else None,
        seconds_left=left.seconds if left and left.timed else 0.0 if state == "finished" else None,
        not_timed=left.unknown if left else (),
        error=ended,
        disk=files.disk,
        shared=files.shared,
        owner=owner,
        heldout_nll=_judged(root, files.made),
    )


@dataclass(frozen=True)
class _Files:
    """What lies in a run's folder: bytes, folders of finished stages, and those of begun ones, relative."""

    disk: int
    shared: int
    made: frozenset[str]
    begun: tuple[str, ...]


def _files(root: Path) -> _Files:
    disk = shared = 0
    made, begun, waiting = set(), list[str](), [str(root)]
    while waiting:
        folder = waiting.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError:  # renamed or removed while we look
            continue
        for entry in entries:
            try:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                    if entry.name.endswith(".tmp"):
                        begun.append(os.path.relpath(entry.path, root).removesuffix(".tmp"))
                    continue
                seen = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            disk += seen.st_size
            shared += seen.st_size * (seen.st_nlink > 1)
            if entry.name == rundir.MANIFEST and not folder.endswith(".tmp"):
                made.add(os.path.relpath(folder, root))
    return _Files(disk, shared, frozenset(made), tuple(sorted(begun)))


def _pieces(root: Path) -> list[Piece] | None:
    """The stages of the plan; None where no plan was written down, or another version wrote it."""
    try:
        return [Piece(**piece) for piece in json.loads((root / PLAN).read_bytes())]
    except (OSError, ValueError, TypeError):
        return None


def _log(root: Path, most: int | None) -> str:
    """A run's log, or the last bytes of it."""
    try:
        with (root / LOG).open("rb") as stream:
            if most is not None:
                stream.seek(max(0, stream.seek(0, os.SEEK_END) - most))
            return stream.read().decode(errors="replace")
    except OSError:
        return ""


def _owner(root: Path) -> str | None:
    """Who is at work in a run; None where nobody is."""
    try:
        found = json.loads((root / rundir.OWNER).read_bytes())
        who = f"{found['host']}, pid {int(found['pid'])}"
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return who if rundir.held(root) else None


def _end(text: str, prepared: bool) -> tuple[str, str | None]:
    """How the last call of a run that is not finished ended: the state and the error."""
    ends = list(ENDED.finditer(text))
    if not ends or BEGUN.search(text, ends[-1].end()):
        return "interrupted", None
    kind, said = ends[-1].groups()
    alone = "prepared" if prepared else "interrupted"  # a run that begins after it logs nothing before its first stage
    return {None: alone, "Stopped": "stopped"}.get(kind, "failed"), said


def _work(text: str, begun: Sequence[str]) -> dict[str, Any]:
    """The stage at work, and how far it is, by the log; else the one that is begun, by its folder."""
    last = next(reversed(list(BEGUN.finditer(text))), None)
    if last is None or f": {last[1]}: took " in text[last.end() :]:
        return {"stage": begun[0]} if begun else {}
    if f": {last[1]}: waits: " in text[last.end() :]:
        return {"stage": f"{last[1]} (another run is making it)"}
    found = [at for at in AT.finditer(text, last.end()) if at[1] == last[1]]
    if not found:
        return {"stage": last[1]}
    at = json.loads(found[-1][2])
    rate = (at["done"] - at["since"]) / at["seconds"] if at["seconds"] else None
    return {"stage": last[1], "done": at["done"], "total": at["total"], "unit": at.get("unit"), "rate": rate}


def _judged(root: Path, made: frozenset[str]) -> dict[int, float]:
    found = {}
    for folder in sorted(name for name in made if re.fullmatch(r"iterate-\d+/evaluate", name)):
        try:
            values = json.loads((root / folder / "metrics.json").read_bytes())
            found[int(folder[8:].partition("/")[0])] = float(values["eval/heldout_nll"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # `evaluate` names what is damaged there
    return found


def taken(root: Path) -> dict[str, str]:
    """The stages that were taken over from other runs, and where from."""
    return dict(TAKEN.findall(_log(root, None)))


def family(root: Path) -> list[Member]:
    """The iterates that are made, or whose pairs are, oldest first."""
    seen = look(root)
    others = taken(root)
    judged = seen.heldout_nll or {}
    members, k = list[Member](), 0
    while True:
        model = rundir.readable(root / f"iterate-{k:02d}/model") or rundir.readable(root / f"iterate-{k:02d}")
        pairs = rundir.readable(root / f"iteration-{k - 1:02d}") if k else None
        if model is None and pairs is None:
            return members
        names = [name for name in others if re.match(rf"iterate-{k:02d}/|iteration-{k - 1:02d}/", name)]
        reused: dict[str, list[str]] = {}
        for name in names:
            reused.setdefault(others[name].partition("/")[0], []).append(name)
        spec = pairs["spec"] if pairs else {}
        members.append(
            Member(
                k,
                "at work" if model is None else model["kind"],
                k - 1 if k else None,
                _shares(spec),
                bool((spec.get("draw") or {}).get("reuse")),
                _formula(spec.get("reference")),
                judged.get(k),
                reused,
            )
        )
        k += 1


def _formula(tree: Any) -> str | None:
    try:
        return opponents.formula(opponents.from_json(tree))
    except (AttributeError, ValueError, KeyError, TypeError):  # there is none, or a later version wrote it
        return None


def _shares(spec: Mapping[str, Any]) -> dict[int, float]:
    """Who answered the prompts of an iteration, by the spec of its pairs: 1 each where all answered everything."""
    if not spec:
        return {}
    if spec["draw"] is None:
        return dict.fromkeys(spec["window"], 1.0)
    return {int(k): float(weight) for k, weight in spec["draw"]["samplers"][-1]}
