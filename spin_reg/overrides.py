"""What people type, and Hydra's complaints about it, in our words: the nearest key, the options of a group."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from hydra.core.config_store import ConfigStore

from spin_reg import manual, vetting
from spin_reg.complaints import bad_value, config_error, unknown_key
from spin_reg.config import Config, all_keys
from spin_reg.errors import ConfigError, SpinRegError
from spin_reg.redact import redacted

TOP = ("model", "dataset", "regularizer", "schedule", "loss", "generation", "evaluation", "tracker", "hardware")
GROUPS = (*TOP, "experiment")
SHELL = {"-sc", "--shell-completion"}
EXTRAS = {  # Hydra's plugins, by the option that chooses them
    ("hydra/launcher", "joblib"): "joblib",
    ("hydra/launcher", "submitit_local"): "submitit",
    ("hydra/launcher", "submitit_slurm"): "submitit",
    ("hydra/launcher", "ray"): "ray",
    ("hydra/sweeper", "optuna"): "optuna",
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


def check(words: Sequence[str]) -> None:
    """Refuse words whose key no group and no setting has, with the nearest named, before Hydra reads them; and what
    could run code."""
    if SHELL & set(words):
        return
    vetting.check(words, GROUPS)
    known = sorted({*all_keys(), *GROUPS})
    for before, word in zip(["", *words], words, strict=False):
        key, equals, _ = word.lstrip("+~").partition("=")
        if before in VALUED or word.startswith("-") or key.startswith(("hydra", "/")):
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


def explain(error: Exception) -> SpinRegError:
    """Hydra's or OmegaConf's error as one of ours; anything else as a failure of ours."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    text = redacted(str(error))  # before any of it is cut, which would hide half a secret
    missing = re.search(r"Could not (?:find|load) '([\w/]+)/([^']+)'", text)
    if missing:
        return _no_option(missing[1], missing[2])
    absent = re.search(r"Key '([^']+)' is not in struct", text)
    if absent:
        full = re.search(r"full_key: (\S+)", text)
        return unknown_key(full[1] if full else absent[1], sorted({*all_keys(), *GROUPS}))
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException):
        return config_error(cause)
    if isinstance(error, OmegaConfBaseException):
        return config_error(error)
    if isinstance(error, HydraException):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
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
    todo = (f"did you mean {group}={near[0]}? " if near else "") + f"{group} takes: {', '.join(options)}"
    return ConfigError(f"There is no {group} {name}.", where=f"{group}={name}", why="no such option", todo=todo)


def _place(error: BaseException) -> str:
    """The innermost file and line of the error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno}" if trace else type(Config).__name__
