"""Verbs that are given a run's folder: the words it began with, and `gc`."""

import os
import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from spin_reg import config, durable, known, launch, overrides, rundir, sheet, space, vetting
from spin_reg.errors import ConfigError, RunBusy, SpinRegError
from spin_reg.settings import KeepIterates

YES = "--yes"


def names_a_folder(words: Sequence[str]) -> bool:
    """Whether the first word is a run's folder, and no flag or setting."""
    first = words[0] if words else "-"
    return not first.startswith("-") and ("=" not in first or Path(first).expanduser().is_dir())


def words_of(verb: str, words: Sequence[str]) -> list[str]:
    """The words a run began with, then the ones given now, then the place of its folder.

    Paths among them are relative to where the run was last typed, so the process moves there.

    Raises:
        ConfigError: the first word is no run's folder. DamagedError: its run.json is damaged.
    """
    if not names_a_folder(words):
        raise ConfigError(
            "Which run?", where=f"spin-reg {verb}", why="no folder was given", todo=f"spin-reg {verb} RUN"
        )
    root = Path(words[0]).expanduser().resolve()
    saved = rundir.provenance(root)
    if saved is None:
        raise ConfigError(
            "This is no run.", where=str(root), why="it has no run.json", todo="spin-reg status lists runs"
        )
    vetting.check_saved(saved["overrides"], root / rundir.RUN)
    sheet.typed_in(Path.cwd())
    if Path(saved["cwd"]).is_dir():
        os.chdir(saved["cwd"])
    place = [f"outputs={quoted(str(root.parent))}", f"run_name={quoted(root.name)}"]
    return _last_wins([*_searched(saved.get("command", [])), *saved["overrides"], *words[1:], *place])


def _searched(command: Sequence[str]) -> list[str]:
    """Where the options of one's own lie that a run was made with: Hydra is to look there again."""
    flags, found = ("--config-dir", "-cd"), list[str]()
    for before, word in pairwise(map(str, command)):
        name, equals, folder = word.partition("=")
        if before in flags or (name in flags and equals):
            place = Path(word if before in flags else folder).expanduser().absolute()
            found = [f"hydra.searchpath=[{quoted(f'file://{place}')}]"]
        if name == "hydra.searchpath":
            found = [word]
    return found


def quoted(text: str) -> str:
    """A value as Hydra's override grammar takes it whatever it holds."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _last_wins(words: Sequence[str]) -> list[str]:
    """Overrides with every key once; Hydra refuses a group that is given twice."""
    return list({word.partition("=")[0]: word for word in words}.values())


def gc(words: Sequence[str], conf: Path) -> int:
    """Print what nothing needs in a run, or in every run of a folder; remove it where `--yes` is among the words.

    Returns:
        The exit code: 0, or that of the first run that could not be looked at or tidied.

    Raises:
        ConfigError: a word that gc does not take, or no such folder.
    """
    known_words = {YES, *(f"keep_iterates={keep}" for keep in KeepIterates)}
    others = [word for word in words if word not in known_words]
    unknown = [word for word in others if word.startswith("keep_iterates=") or not names_a_folder([word])]
    if unknown:
        raise ConfigError(
            "gc does not take this.",
            where=unknown[0],
            why="it takes a folder, keep_iterates=needed or last, and --yes",
            todo="spin-reg gc [DIR] [keep_iterates=needed] [--yes]",
        )
    keep = [word for word in words if word.startswith("keep_iterates=")]
    folders = [word for word in words if word not in (*keep, YES)]
    place = Path(folders[0] if folders else "outputs").expanduser().resolve()
    if not place.is_dir():
        raise ConfigError("No such folder.", where=str(place), why="it does not exist", todo="spin-reg gc DIR")
    alone = (place / rundir.RUN).exists()
    outputs = place.parent if alone else place
    roots = [place] if alone else sorted(path.parent for path in place.glob(f"*/{rundir.RUN}"))
    found = list[space.Garbage]()
    collected = [_collect(root, keep, conf, found, remove=YES in words) for root in roots]
    index = space.stale_index(outputs)
    if index:
        print(f"{outputs / known.STAGES}: {len(index)} entries of stages that are gone")
        for path in index if YES in words else []:
            durable.remove(path)
    done = "removed" if YES in words else f"to be freed; nothing was removed: add {YES} to do it"
    frees = sum(size for size, _ in collected) if YES in words else space.freed(found)
    print(f"{space.human(frees)} {done}")
    return next((code for _, code in collected if code), 0)


def _collect(
    root: Path, keep: Sequence[str], conf: Path, shown: list[space.Garbage], *, remove: bool
) -> tuple[int, int]:
    """One run's garbage, printed, and removed or added to what is `shown`; the bytes that frees, and an exit code."""
    try:
        planned = _planned(root, keep, conf)
        kept = planned.future
        with rundir.owned(root):
            found = space.garbage(root, planned.stages, planned.config.keep_iterates, kept)
            for item in found:
                size = space.human(item.frees) if item.frees else "nothing by itself (another run holds it too)"
                print(f"{shlex.quote(str(item.path))}: {item.why}; frees {size}")
            shown += found
            if remove:
                space.remove(found)
        return sum(item.frees for item in found), 0
    except RunBusy as error:
        print(f"{root}: left alone, it is at work ({error.why})")
        return 0, 0
    except SpinRegError as error:
        print(f"{root}: not tidied ({error.what} {error.where}: {error.why})")
        return 0, error.exit_code


def _planned(root: Path, keep: Sequence[str], conf: Path) -> Any:
    """The plan of the run in this folder."""
    here = os.getcwd()
    try:
        words = words_of("gc", [str(root), *keep])
        overrides.check(words)
        config.register()
        overrides.register_help(conf)
        with initialize_config_dir(str(conf), version_base="1.3"):
            return launch.prepare(config.load(compose("config", words), sweep=True))
    except SpinRegError:
        raise
    except Exception as error:
        raise overrides.explain(error) from error
    finally:
        os.chdir(here)
