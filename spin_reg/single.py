"""One run, or the page of a verb, from settings that are composed once.

Hydra's own entry point composes all settings twice, the first time only to read `hydra.mode`, and for --help it lists
every option of every group, its own too, whether the page shows them or not. Where nothing on the command line speaks
to Hydra the mode is known, and the page has a list of its own.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from string import Template
from typing import Any

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

HELP = {"-h", "--help"}


def plain(words: Sequence[str]) -> bool:
    """Whether the words are settings of ours alone: no flag, and nothing that is Hydra's."""
    return not any(word.startswith("-") or "hydra" in word.partition("=")[0] for word in words)


def sweeping(conf: Path) -> bool:
    """Whether a file of the tree may turn a run into a sweep, as an experiment's may: by hydra.mode=MULTIRUN in it."""
    return any("MULTIRUN" in path.read_text(encoding="utf-8") for path in conf.rglob("*.yaml"))


def run(conf: Path, words: Sequence[str], task: Callable[[Any], Any]) -> None:
    """What `hydra.main` does with such words once it knows the mode.

    Raises:
        Whatever Hydra raises, or the task.
    """
    with initialize_config_dir(str(conf), job_name="cli", version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        hydra.run(config_name="config", task_function=task, overrides=[*words, "hydra.mode=RUN"])


def show_help(conf: Path, words: Sequence[str], page: str) -> None:
    """Print a page with the settings that the words give in the place of its $CONFIG.

    Raises:
        Whatever Hydra raises.
    """
    with initialize_config_dir(str(conf), job_name="cli", version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        cfg = hydra.compose_config(config_name="config", overrides=list(words), run_mode=RunMode.RUN)
    shown = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    print(Template(page).substitute(CONFIG=OmegaConf.to_yaml(shown)))
