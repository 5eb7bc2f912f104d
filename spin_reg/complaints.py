"""Errors about settings, in the words in which they are typed."""

import difflib

from omegaconf.errors import OmegaConfBaseException

from spin_reg.errors import ConfigError


def holds_a_secret(key: str, secret: str) -> ConfigError:
    """The error for a setting with a secret in it; its value is not echoed."""
    return ConfigError(
        "A setting holds a secret.",
        where=key,
        why=f"it has {secret}, and settings are written into the run folder and sent to trackers",
        todo="take it out; credentials belong into the environment (HF_TOKEN, WANDB_API_KEY) or a netrc file",
    )


def bad_value(message: str) -> ConfigError:
    """A ConfigError from a `key=value: what is allowed` message."""
    key, _, allowed = message.partition(": ")
    if not allowed:
        key, allowed = "the configuration", message
    return ConfigError("A setting cannot be used.", where=key, why=allowed, todo="change it and run again")


def config_error(error: OmegaConfBaseException) -> ConfigError:
    """A ConfigError from one of OmegaConf's."""
    key = getattr(error, "full_key", None) or "the configuration"
    why = str(error).splitlines()[0]
    if "issing mandatory value" in why:
        return ConfigError("A setting must be given.", where=key, why="it has no default", todo=f"add {key}=...")
    return ConfigError("A setting cannot be used.", where=key, why=why, todo=f"give {key} another value")


def unknown_key(key: str, known: list[str]) -> ConfigError:
    """A ConfigError that names the nearest keys."""
    last = {"lr": "learning_rate"}.get(key, key.rpartition(".")[2])
    near = [name for name in known if name.rpartition(".")[2] == last][:3]
    near = (
        near
        or difflib.get_close_matches(key, known, n=1, cutoff=0.9)
        or difflib.get_close_matches(key, known, n=3, cutoff=0.5)
        or (known if len(known) < 10 else [])
    )
    todo = f"did you mean {' or '.join(near)}?" if near else "`spin-reg train --help` lists all"
    return ConfigError(f"There is no setting {key}.", where=key, why="no part of the configuration has it", todo=todo)
