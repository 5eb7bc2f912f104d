"""What people type, and Hydra's complaints about it, in our words: the nearest key, the options of a group."""

import re
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore

from spin_reg import manual, vetting
from spin_reg.benchmarks import Benchmark
from spin_reg.complaints import bad_value, config_error, unknown_key
from spin_reg.config import GROUPS as CHOICES
from spin_reg.config import Config, all_keys, keys_of
from spin_reg.corpora import Part
from spin_reg.errors import ConfigError, SpinRegError
from spin_reg.redact import redacted

TOP = ("model", "dataset", "regularizer", "schedule", "loss", "generation", "evaluation", "tracker", "hardware")
GROUPS = (*TOP, "experiment")
PLACES = {  # how a group is given a path
    "model": "model=pretrained model.name_or_path={}",
    "dataset": "dataset=jsonl dataset.path={0}, or dataset=hub dataset.path={0}",
}
SHELL = {"-sc", "--shell-completion"}
EXTRAS = {  # Hydra's plugins, by the option that chooses them
    ("hydra/launcher", "joblib"): "joblib",
    ("hydra/launcher", "submitit_local"): "submitit",
    ("hydra/launcher", "submitit_slurm"): "submitit",
    ("hydra/launcher", "ray"): "ray",
    ("hydra/sweeper", "optuna"): "optuna",
}
LISTED: dict[str, Any] = {kind.__name__: kind for kind in (Part, Benchmark)}  # what stands in lists of settings
FLAGS = {  # Hydra's others
    *("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m"),
    *("--shell-completion", "-sc", "--experimental-rerun"),
}
VALUED = {  # Hydra's flags that a value follows
    *("--cfg", "-c", "--package", "-p", "--config-name", "-cn"),
    *("--config-path", "-cp", "--config-dir", "-cd", "--info", "-i"),
}


HELP = """\
{page}
GROUPS (choose with group=option)
{groups}

SETTINGS (change with key=value)
$CONFIG
"""


def register_help(conf: Path, verb: str = "train") -> str:
    """Hydra's --help: the verb's page, and the groups that conf/ holds (its own listing would show the schemas too).

    Returns:
        The same, where $CONFIG stands for the settings.
    """
    options = {group: sorted(path.stem for path in (conf / group).glob("*.yaml")) for group in GROUPS}
    groups = "\n".join(f"  {group}: {', '.join(names)}" for group, names in options.items())
    page = HELP.format(page=manual.page(verb).replace("$", "$$"), groups=groups)
    node = {"app_name": "spin-reg", "header": "", "footer": "", "template": page}
    ConfigStore.instance().store(group="hydra/help", name="spin_reg", node=node)
    return page


def check(words: Sequence[str]) -> list[str]:
    """Refuse words whose key no group and no setting has, with the nearest named, before Hydra reads them; and what
    could run code.

    Returns:
        The words, flags first: Hydra takes settings in one piece.
    """
    if SHELL & set(words):
        return list(words)
    words = _flags_first(words)
    vetting.check(words, GROUPS)
    known = sorted({*all_keys(), *GROUPS})
    for before, word in zip(["", *words], words, strict=False):
        key, equals, _ = word.lstrip("+~").partition("=")
        if _takes_a_value(before) or word.startswith("-") or key.startswith(("hydra", "/")):
            continue
        if not equals and not word.startswith("~"):
            if re.fullmatch(r"[\w.]+", word):
                near = get_close_matches(word, known, n=1)
                todo = f"write {near[0] if near else word}=value"
                raise ConfigError("This word sets nothing.", where=word, why="settings are key=value", todo=todo)
            continue
        name = key.partition("@")[0]
        if name in TOP and word.partition("=")[2] in ("", "null"):
            options = ", ".join(option_names(name))
            raise ConfigError(f"{name} must be given.", where=word, why="a run needs one", todo=f"{name}={options}")
        if name not in known:
            raise unknown_key(name, known)
    return list(words)


def _flags_first(words: Sequence[str]) -> list[str]:
    flags: list[str] = []
    rest: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        if word.startswith("-") and _flag(word) is None:
            near = get_close_matches(word.partition("=")[0].lstrip("-"), [*all_keys(), *GROUPS], n=1)
            todo = f"write {near[0]}=value" if near else "`spin-reg train --help` lists all"
            raise ConfigError("There is no such flag.", where=word, why="settings are written key=value", todo=todo)
        (flags if word.startswith("-") or _takes_a_value(before) else rest).append(word)
    return flags + rest


def _takes_a_value(word: str) -> bool:
    """Whether the next word is this one's."""
    return "=" not in word and _flag(word) in VALUED


def _flag(word: str) -> str | None:
    """Hydra's flag that a word is, whole or, as argparse takes it too, begun."""
    name = word.partition("=")[0]
    begun = [flag for flag in FLAGS | VALUED if name.startswith("--") and flag.startswith(name)]
    return name if name in FLAGS | VALUED else begun[0] if len(begun) == 1 else None


def explain(error: Exception) -> SpinRegError:
    """Hydra's or OmegaConf's error as one of ours; anything else as a failure of ours."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    text = redacted(str(error))  # before any of it is cut, which would hide half a secret
    missing = re.search(rf"Could not (?:find|load) '({'|'.join(GROUPS)}|hydra/\w+)/([^']+)'", text)
    if missing:
        return _no_option(missing[1], missing[2])
    absent = re.search(r"Key '([^']+)' is not in struct", text)
    if absent:
        full = re.search(r"full_key: (\S+)", text)
        return unknown_key(full[1] if full else absent[1], sorted({*all_keys(), *GROUPS}))
    cause = error.__cause__
    of_settings = cause if isinstance(cause, OmegaConfBaseException) else error
    if isinstance(of_settings, OmegaConfBaseException):
        strange = re.search(r"Key '([^']+)' not in '(\w+)'", str(of_settings))
        if strange and strange[2] in LISTED:
            return unknown_key(strange[1], [f.name for f in fields(LISTED[strange[2]])])
        return _not_there(str(of_settings.full_key or strange[1])) if strange else config_error(of_settings)
    if isinstance(error, HydraException):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        several = re.search(r"Ambiguous value for argument '([^']+)'|Sweep parameters '([^']+)'", text)
        if several:
            word = several[1] or several[2]
            why, todo = "it has several values, and one run takes one", f"add -m to make a run of each: -m '{word}'"
            return ConfigError("One run, or several?", where=word, why=why, todo=todo + ("; or a list: key=[a,b]"))
        return ConfigError(
            "The settings cannot be composed.",
            where="the command line",
            why=" ".join(lines)[:400],
            todo="see `spin-reg train --help`; values with special characters need quotes: 'key=\"value\"'",
        )
    if isinstance(error, ValueError) and re.match(r"[\w.]+=", text):
        return bad_value(text)
    return SpinRegError(
        f"spin-reg failed: {type(error).__name__}.",
        where=_place(error),
        why=text[:400] or "no message",
        todo="set HYDRA_FULL_ERROR=1 for the traceback (it is in the run's run.log too), and report it",
    )


def _not_there(key: str) -> ConfigError:
    """The error for a setting that its group's option does not have, though another may."""
    group, _, name = key.partition(".")
    holders = [option for option, kind in CHOICES.get(group, {}).items() if f"{group}.{name}" in keys_of(group, kind)]
    if not holders:
        return unknown_key(key, sorted({*all_keys(), *GROUPS}))
    todo = f"add {' or '.join(f'{group}={option}' for option in holders)}, or leave it out"
    return ConfigError(f"There is no setting {key} here.", where=key, why=f"the {group} chosen has none", todo=todo)


def option_names(group: str) -> list[str]:
    """The options of a group: the YAML files of its folder in conf/."""
    from spin_reg.cli import conf_dir

    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def _no_option(group: str, name: str) -> ConfigError:
    options = option_names(group)
    if (group, name) in EXTRAS:
        extra = EXTRAS[group, name]
        why, todo = f"it is in an extra that is not here: {extra}", f"pip install spin-reg[{extra}]"
        return ConfigError(f"There is no {group} {name}.", where=f"{group}={name}", why=why, todo=todo)
    near = get_close_matches(name, options, n=1, cutoff=0.4)
    if group in PLACES and "/" in name:
        todo = f"a path or a name of the Hub is given by {PLACES[group].format(name)}"
        return ConfigError(f"There is no {group} {name}.", where=f"{group}={name}", why="no such option", todo=todo)
    todo = (f"did you mean {group}={near[0]}? " if near else "") + f"{group} takes: {', '.join(options)}"
    if group == "tracker":
        todo += f"; others of Accelerate by tracker=tensorboard tracker.name={name}"
    return ConfigError(f"There is no {group} {name}.", where=f"{group}={name}", why="no such option", todo=todo)


def _place(error: BaseException) -> str:
    """The innermost file and line of the error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno}" if trace else type(Config).__name__
