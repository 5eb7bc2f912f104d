"""The manual and the parser of the verbs, made from their table."""

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spin_reg.errors import ConfigError
from spin_reg.grammar import EXITS, Verb, Word
from spin_reg.verbs import TABLE

WIDTH = 100


def overview() -> str:
    """What `spin-reg --help` says."""
    verbs = _columns([(f"spin-reg {name}", verb.what) for name, verb in TABLE.items()])
    return f"""\
spin-reg: regularized self-play fine-tuning of language models, the whole loop in one command.

VERBS
{verbs}

HELP
  spin-reg VERB --help              what it takes, with examples and exit codes
  spin-reg train --help             every group and every setting too
  eval "$(spin-reg --completion bash)"    completion of words, also zsh; spin-reg --completion fish | source
  spin-reg --version

Try it:  spin-reg train regularizer=kl alpha=0.5     (a minute on a laptop, no network)
"""


def usage(name: str) -> str:
    """One line: the verb and what it takes."""
    verb = TABLE[name]
    words = [_in_usage(word) for word in verb.words] + (["[key=value ...]"] if verb.settings else [])
    return " ".join(["spin-reg", name, *words])


def page(name: str) -> str:
    """The page of a verb."""
    verb = TABLE[name]
    parts = [f"NAME\n  spin-reg {name}: {verb.what}", f"USAGE\n{_filled(usage(name), '      ')}"]
    parts += [_filled(paragraph) for paragraph in verb.text.split("\n") if paragraph]
    if listed := _taken(verb):
        parts.append(f"OPTIONS\n{_columns(listed)}")
    if verb.shows:
        parts.append(f"WHAT IT SHOWS\n{_columns(verb.shows)}")
    if verb.examples:
        parts.append("EXAMPLES\n" + "\n".join(f"  {line}\n      {what}" for line, what in verb.examples))
    parts.append("EXIT CODES\n" + _columns([(str(code), EXITS[code]) for code in verb.exits]))
    return "\n\n".join(parts) + "\n"


def parsed(name: str, words: Sequence[str]) -> argparse.Namespace:
    """The words behind a verb, by name: RUN as `run`, --to as `to`; None where one was not given, a list where many.
    Of a verb that picks runs by settings also the {key: value} of those, as `settings`.

    Raises:
        ConfigError: words that the verb does not take, or lacks.
    """
    parser = _Parser(prog=f"spin-reg {name}", usage=usage(name), add_help=False, allow_abbrev=False)
    parser.verb = name
    taken = [word for word in TABLE[name].words if "=" not in word.name]
    picks = len(taken) < len(TABLE[name].words)
    settings = [word for word in words if picks and "=" in word and not Path(word).expanduser().is_dir()]
    for word in taken:
        parser.add_argument(*_argument(word), **_how(word))
    given = parser.parse_args([word for word in words if word not in settings])
    given.settings = dict(word.split("=", 1) for word in settings)
    for word in taken:
        value = getattr(given, _key(word))
        for one in value if isinstance(value, list) else [value]:
            if word.choices and one is not None and one not in word.choices:
                parser.error(f"{word.name} {one}: give one of {', '.join(word.choices)}")
    return given


class _Parser(argparse.ArgumentParser):
    """argparse with errors of ours."""

    verb = ""

    def error(self, message: str) -> Any:
        todo = f"{usage(self.verb)}; more: spin-reg {self.verb} --help"
        raise ConfigError(f"{self.verb} cannot take this.", where=f"spin-reg {self.verb}", why=message, todo=todo)


def _key(word: Word) -> str:
    return word.name.lstrip("-").replace("-", "_").lower()


def _argument(word: Word) -> tuple[str, ...]:
    return (word.name,) if word.is_option else (_key(word),)


def _how(word: Word) -> dict[str, Any]:
    if word.is_option and not word.value:
        return {"action": "store_true"}
    how: dict[str, Any] = {"type": word.read, "metavar": word.value or word.name}
    if word.is_option:
        return how | {"required": word.needed} | ({"action": "append"} if word.many else {})
    return how | ({"nargs": "*" if word.many else "?"} if word.optional else {"nargs": "+"} if word.many else {})


def _in_usage(word: Word) -> str:
    text = word.shown() + (" ..." if word.many else "")
    return text if word.needed or not (word.is_option or word.optional or "=" in word.name) else f"[{text}]"


def _taken(verb: Verb) -> list[tuple[str, str]]:
    listed = [(word.shown(), word.what) for word in verb.words]
    return listed + ([("key=value", "any setting; spin-reg train --help lists them")] if verb.settings else [])


def _filled(text: str, more: str = "  ") -> str:
    return textwrap.fill(text, WIDTH, initial_indent="  ", subsequent_indent=more, break_on_hyphens=False)


def _columns(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns; what is too wide for the first stands on a line of its own."""
    wide = min(26, max(len(left) for left, _ in rows))
    lines = []
    for left, right in rows:
        text = textwrap.wrap(right, WIDTH - wide - 4, break_on_hyphens=False)
        lines += [f"  {left}"] if len(left) > wide else []
        first = "" if len(left) > wide else left
        lines += [f"  {first if i == 0 else '':{wide}}  {line}" for i, line in enumerate(text)]
    return "\n".join(lines)
