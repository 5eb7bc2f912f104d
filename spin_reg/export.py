"""The verb `export`: an iterate as an ordinary Hugging Face folder with its model card, or an iteration's pairs."""

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from spin_reg import config, durable, launch, named
from spin_reg.config import Config
from spin_reg.errors import ConfigError
from spin_reg.policies import policy
from spin_reg.settings import Quantize

MODEL = "hf"


def check(given: argparse.Namespace) -> None:
    """Refuse words that would have no effect, and a place that is taken.

    Raises:
        ConfigError: as said; or there is no token to push with.
    """
    model = given.format == MODEL
    idle = [
        ("--iterate", given.iterate is not None and not model, f"--format {given.format} takes an iteration's pairs"),
        ("--by", given.by is not None and not model, f"--format {given.format} takes an iteration's pairs"),
        ("--iteration", given.iteration is not None and model, "--format hf takes an iterate"),
        ("--public", given.public and given.push_to_hub is None, "nothing is pushed"),
    ]
    for word, wrong, why in idle:
        if wrong:
            raise ConfigError("This would have no effect.", where=word, why=why, todo="leave it out")
    to: Path = given.to
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        why, todo = "it is there, and not empty", "give a folder that is not there yet"
        raise ConfigError("An export overwrites nothing.", where=f"--to {to}", why=why, todo=todo)
    if given.push_to_hub is not None:
        from spin_reg import hub

        hub.check_token(given.push_to_hub)


def task(cfg: Any, *, given: argparse.Namespace) -> None:
    """What the verb does with a run's composed settings."""
    settings = config.load(cfg, sweep=True)  # as lenient as any command that made it
    launch.environment(settings)
    root, name = Path(settings.outputs) / config.run_name(settings), given.push_to_hub or given.to.name
    if given.format == MODEL:
        iterate = named.iterate(root, given.iterate or named.LAST, given.by)
        words = f"Iterate {iterate.k} of {root.name}"
        _published(given.to, lambda work: _model(settings, root, iterate, work, name, given.license))
    else:
        from spin_reg import handover

        words = f"Pairs of {root.name}"
        ask: dict[str, Any] = {"name": name, "license": given.license}
        _published(given.to, lambda work: handover.write(settings, root, given.format, given.iteration, work, **ask))
    print(given.to)
    if given.push_to_hub is not None:
        from spin_reg import hub

        dataset = given.format != MODEL
        print(hub.push(given.to, given.push_to_hub, dataset=dataset, private=not given.public, message=words))


def _published(to: Path, write: Callable[[Path], None]) -> None:
    """A folder that is there whole or not at all."""
    work = to.with_name(f".{to.name}.tmp")
    durable.remove(work)
    durable.make_folder(work)
    write(work)
    for path in work.rglob("*"):  # safetensors makes files for their owner alone, whatever others may read here
        if path.is_file():
            path.chmod(0o666 & ~_umask())
    if to.exists():
        to.rmdir()
    durable.rename_folder(work, to)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _model(settings: Config, root: Path, iterate: named.Named, work: Path, name: str, license: str | None) -> None:
    """An iterate as a folder that from_pretrained reads, with its card.

    Weights that were quantized for training are exported as they came, with the adapter merged into them.
    """
    from spin_reg import card, iterates

    iterates.save(iterates.whole(iterate.folder, replace(policy(settings), quantize=Quantize.none)), work)
    durable.write_bytes(
        work / "README.md", card.of_iterate(settings, root, iterate, name=name, license=license).encode()
    )
