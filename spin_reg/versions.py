"""The versions of what results may hang on in their last bits."""

import platform
from collections.abc import Mapping, Sequence
from importlib import metadata

from spin_reg import __version__

PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "datasets", "numpy", "pyarrow", "safetensors", "wandb")


def here(also: Sequence[str] = ()) -> dict[str, str]:
    """Those of now. `also`: packages that are used as well, where they are used."""
    own = {"python": platform.python_version(), "spin-reg": __version__}
    return own | {name: metadata.version(name) for name in (*PACKAGES, *also)}


def began(before: Mapping[str, str], also: Sequence[str] = ()) -> dict[str, str]:
    """Those that a run began with, as recorded `before` if it did; and of `also` those that it begins to use now."""
    now = here(also)
    return {**before, **{name: now[name] for name in also if name not in before}} if before else now


def changed(began: Mapping[str, str], also: Sequence[str] = ()) -> list[str]:
    """What is not what it was, as words."""
    now = here(also)
    return [f"{name} {began.get(name)} -> {now[name]}" for name in now if began.get(name) != now[name]]
