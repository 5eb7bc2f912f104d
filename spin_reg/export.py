"""The verb `export`: an iterate as an ordinary Hugging Face folder, an adapter merged into its base."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from spin_reg import config, durable, launch, rundir
from spin_reg.config import Config
from spin_reg.errors import ConfigError
from spin_reg.policies import policy
from spin_reg.settings import Quantize


def task(cfg: Any, *, k: int | None, to: Path) -> None:
    """What the verb does with a run's composed settings."""
    settings = config.load(cfg, sweep=True)  # as lenient as any command that made it
    launch.environment(settings)
    print(export(settings, Path(settings.outputs) / config.run_name(settings), k, to))


def export(settings: Config, root: Path, k: int | None, to: Path) -> Path:
    """Write iterate k (None: the last one) of the run in `root` as a folder that from_pretrained reads; returns it.

    Weights that were quantized for training are exported as they came, with the adapter merged into them.

    Raises:
        ConfigError: no such iterate, or `to` holds something. DamagedError: the iterate's files are not whole.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        why, todo = "it is there, and not empty", "give a folder that is not there yet"
        raise ConfigError("An export overwrites nothing.", where=f"--to {to}", why=why, todo=todo)
    folder = _folder(root, k)
    found = rundir.manifest(folder)
    assert found is not None
    rundir.check_hashes(folder, found)
    from spin_reg import iterates

    work = to.with_name(f".{to.name}.tmp")
    durable.remove(work)
    durable.make_folder(work)
    iterates.save(iterates.whole(folder, replace(policy(settings), quantize=Quantize.none)), work)
    if to.exists():
        to.rmdir()
    durable.rename_folder(work, to)
    return to


def _folder(root: Path, k: int | None) -> Path:
    """Where iterate k lies, with its weights or with the record of its base."""
    there = {}
    for path in [root / "iterate-00", *root.glob("iterate-*/model")]:
        made = rundir.readable(path)
        if made is not None and not made["removed"]:
            name = path.name if path.name.startswith("iterate-") else path.parent.name
            there[int(name.removeprefix("iterate-"))] = path
    wanted = max(there, default=0) if k is None else k
    if wanted not in there:
        raise ConfigError(
            "This iterate is not there.",
            where=f"{root}, --iterate {wanted}",
            why=f"with their weights: {', '.join(map(str, sorted(there))) or 'none'}",
            todo="spin-reg resume RUN makes what is missing",
        )
    return there[wanted]
