"""The versions of what results may hang on in their last bits."""

import platform
from collections.abc import Mapping
from importlib import metadata

from spin_reg import __version__

PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "datasets", "numpy", "pyarrow", "safetensors", "wandb")


def here() -> dict[str, str]:
    own = {"python": platform.python_version(), "spin-reg": __version__}
    return own | {name: metadata.version(name) for name in PACKAGES}


def changed(began: Mapping[str, str]) -> list[str]:
    """What is not what it was, as words."""
    now = here()
    return [f"{name} {began.get(name)} -> {now[name]}" for name in now if began.get(name) != now[name]]
