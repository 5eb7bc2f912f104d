"""The chat template that a model's tokenizer renders with: its own or a file's, and what it is given by name."""

import keyword
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spin_reg.errors import ConfigError
from spin_reg.settings import Pretrained

CLOCK, DATE = "strftime_now", "date_string"  # what templates ask for the time, and the name that many take in its place
SET_BY_THE_RENDERER = {
    *("messages", "conversation", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize"),
    *(
        "chat_template",
        "raise_exception",
        "strftime_now",
        "namespace",
        "dict",
        "range",
        "loop",
        "true",
        "false",
        "none",
    ),
}


def asked(model: Pretrained) -> dict[str, Any]:
    """How the settings want a tokenizer to render, by content: `chat_template` (text) and `template_kwargs`, if set.

    Raises:
        ConfigError: no such file, not UTF-8, or nothing in it; a name or a value that no template can be given.
    """
    found: dict[str, Any] = {}
    if model.chat_template is not None:
        found["chat_template"] = _read(model.chat_template)
    for name, value in model.template_kwargs.items():
        where, todo = f"model.template_kwargs.{name}={value}", "leave it out"
        if not name.isidentifier() or keyword.iskeyword(name):
            raise _refused(where, "this is no name that a template could ask for", todo)
        if name in SET_BY_THE_RENDERER or name.endswith("_token"):
            raise _refused(where, "the renderer sets this itself, in sampling and in training alike", todo)
        plain = value is None or isinstance(value, str | bool | int) or (type(value) is float and math.isfinite(value))
        if not plain:
            raise _refused(where, f"it is a {type(value).__name__}", "give text, a finite number, true, false or null")
    return found | ({"template_kwargs": model.template_kwargs} if model.template_kwargs else {})


def _refused(where: str, why: str, todo: str) -> ConfigError:
    return ConfigError("The chat template cannot be given this.", where=where, why=why, todo=todo)


def _read(name: str) -> str:
    try:
        text = Path(name).expanduser().read_text(encoding="utf-8")
        why = "" if text.strip() else "it is empty"
    except (OSError, UnicodeDecodeError) as error:
        why = str(error)
    if why:
        raise ConfigError(
            "The chat template cannot be read.",
            where=f"model.chat_template={name}",
            why=why,
            todo="give a text file with a Jinja template, or leave it out to use the tokenizer's own",
        )
    return text


def given(template: str, kwargs: Mapping[str, Any]) -> str:
    """The template with defaults for what it asks for at its front.

    There they are saved with the tokenizer, so that whoever renders with an iterate renders as it was trained, unless
    the same name is passed.

    Raises:
        ConfigError: the template does not ask for one of the names; or it writes today's date into prompts.
    """
    if CLOCK in template and DATE not in kwargs:
        pinned = f"pin it: 'model.template_kwargs={{{DATE}: 26 Jul 2024}}'; or " if DATE in template else ""
        raise ConfigError(
            "The chat template writes today's date into every prompt.",
            where=f"the chat template, {CLOCK}",
            why="the same settings would make other prompts tomorrow, and a run that goes on would not be one run",
            todo=f"{pinned}give a copy of the template with a fixed date: model.chat_template=FILE",
        )
    for name, value in kwargs.items():
        if not re.search(rf"\b{name}\b", template):
            why = f"{name} stands nowhere in the chat template, so it would have no effect"
            raise _refused(f"model.template_kwargs.{name}={value}", why, "leave it out, or give the name that it knows")
    defaults = [
        f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}"
        for name, value in sorted(kwargs.items())
    ]
    return "\n".join([*defaults, template])  # the renderer drops a newline behind a tag: nothing is added to the text


def _literal(value: Any) -> str:
    """A plain value in Jinja's own writing."""
    if isinstance(value, str):
        return '"' + value.encode("unicode_escape").decode().replace('"', '\\"') + '"'
    return str(value).lower()
