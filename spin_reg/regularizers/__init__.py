"""The regularizers, one file each; a file's name is the regularizer's name in the config group `regularizer`."""

import importlib
import pkgutil

from spin_reg.opponents import Regularizer


def _classes(module_name: str) -> list[type[Regularizer]]:
    module = importlib.import_module(f"{__name__}.{module_name}")
    found = [v for v in vars(module).values() if isinstance(v, type) and issubclass(v, Regularizer)]
    return [c for c in found if c.__module__ == module.__name__]


def _discover() -> dict[str, type[Regularizer]]:
    registry = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda i: i.name):
        classes = _classes(info.name)
        assert len(classes) == 1, f"spin_reg/regularizers/{info.name}.py must define exactly one Regularizer"
        registry[info.name] = classes[0]
    return registry


REGULARIZERS: dict[str, type[Regularizer]] = _discover()


def name_of(regularizer: Regularizer) -> str:
    """The registered name of a regularizer object."""
    return type(regularizer).__module__.rpartition(".")[2]
