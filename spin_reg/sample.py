"""The verb `sample`: what iterates of a run answer to prompts of one's own."""

import argparse
import json
import math
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from spin_reg import config, launch, named
from spin_reg.config import Config
from spin_reg.console import PIPED_WIDTH
from spin_reg.corpora import Corpus, Jsonl
from spin_reg.errors import ConfigError, DataError
from spin_reg.policies import policy
from spin_reg.render import Messages

Answers = list[tuple[Any, str]]  # of one iterate: what was drawn, and that as text


def prompts(given: argparse.Namespace) -> list[Messages]:
    """What is asked, in the order it was given; a system message may still have to come in front.

    Raises:
        ConfigError: nothing is asked. DataError: a row of the file is no prompt.
    """
    texts = [sys.stdin.read() if text == "-" else text for text in given.prompt or []]
    if not texts and given.prompts is None:
        if sys.stdin is None or sys.stdin.isatty():
            why, todo = "no prompt was given, and none is piped in", "spin-reg sample RUN --prompt TEXT"
            raise ConfigError("What shall be asked?", where="spin-reg sample", why=why, todo=todo)
        texts = [sys.stdin.read()]
    texts = [text.removesuffix("\n") for text in texts]
    if not all(text.strip() for text in texts):
        raise ConfigError("A prompt is empty.", where="--prompt", why="there is nothing to ask", todo="give a text")
    asked: list[Messages] = [[{"role": "user", "content": text}] for text in texts]
    return asked + (_of_file(Path(given.prompts).expanduser()) if given.prompts is not None else [])


def _of_file(path: Path) -> list[Messages]:
    from spin_reg import rows

    if not path.is_file():
        raise DataError("The prompts cannot be read.", where=f"--prompts {path}", why="no such file", todo="give one")
    made: list[Messages] = []
    with rows.opened(Jsonl(path=str(path))) as source:
        for number, _, row in source.scan(lambda done, total, unit: None):
            messages = _prompt(row)
            if messages is None:
                why = f"row {number} has neither a prompt (text) nor messages that end with the user's"
                todo = 'write rows as {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}'
                raise DataError("A row is no prompt.", where=f"--prompts {path}", why=why, todo=todo)
            made.append(messages)
    if not made:
        raise DataError("There is nothing to ask.", where=f"--prompts {path}", why="it has no row", todo="give rows")
    return made


def _prompt(row: Any) -> Messages | None:
    """A row of a file of prompts as a conversation that waits for its answer."""
    if not isinstance(row, dict):
        return None
    listed = row.get("messages", [{"role": "user", "content": row.get("prompt")}])
    ok = isinstance(listed, list) and bool(listed)
    for message in listed if ok else []:
        ok &= isinstance(message, dict) and message.get("role") in ("system", "user", "assistant")
        ok = ok and isinstance(message.get("content"), str) and bool(message["content"].strip())
    if not ok or listed[-1]["role"] != "user":
        return None
    return [{"role": message["role"], "content": message["content"]} for message in listed]


def check(given: argparse.Namespace) -> None:
    """Refuse numbers that nothing can be drawn with.

    Raises:
        ConfigError: a number is out of its range.
    """
    t, p, n = given.temperature, given.top_p, given.max_new_tokens
    wrong = [
        (t is not None and not (math.isfinite(t) and t >= 0), f"--temperature {t}", "give a number from 0"),
        (p is not None and not 0 < p <= 1, f"--top-p {p}", "give a number above 0, up to 1"),
        (p is not None and t == 0, f"--top-p {p}", "leave it out: --temperature 0 takes the likeliest token"),
        (n is not None and n < 1, f"--max-new-tokens {n}", "give a whole number from 1"),
    ]
    for bad, where, todo in wrong:
        if bad:
            raise ConfigError("Answers cannot be drawn like this.", where=where, why="out of range", todo=todo)


def task(cfg: Any, *, given: argparse.Namespace, asked: list[Messages]) -> None:
    """What the verb does with a run's composed settings."""
    settings = config.load(cfg, sweep=True)  # as lenient as any command that made it
    root = Path(settings.outputs) / config.run_name(settings)
    wanted: list[str] = given.iterate or [named.LAST]
    by_best = given.by if named.BEST in wanted else None
    if given.by is not None and by_best is None:
        named.iterate(root, wanted[0], given.by)  # which refuses it
    found = [named.iterate(root, name, by_best if name == named.BEST else None) for name in wanted]
    launch.environment(settings)
    from spin_reg import answering

    system = getattr(settings.dataset, "system_prompt", None) if given.system is None else given.system
    asked = [_with_system(messages, system, strict=given.system is not None) for messages in asked]
    drawing = _drawing(settings, given)
    answers = [answering.ask(it.folder, policy(settings), settings.hardware, asked, drawing) for it in found]
    if given.json:
        _as_json(found, asked, answers, given)
    else:
        _as_text(found, asked, answers)


def _with_system(messages: Messages, system: str | None, *, strict: bool) -> Messages:
    own = any(message["role"] == "system" for message in messages)
    if own and strict:
        why = "a prompt of the file has a system message of its own"
        raise ConfigError("There are two system messages.", where="--system", why=why, todo="leave one out")
    return messages if own or system is None else [{"role": "system", "content": system}, *messages]


def _drawing(settings: Config, given: argparse.Namespace) -> Any:
    from spin_reg.answering import Drawing

    own, data = settings.generation, settings.dataset
    longest = given.max_new_tokens or own.max_new_tokens or data.max_response_tokens
    return Drawing(
        seed=given.seed or 0,
        temperature=own.temperature if given.temperature is None else given.temperature,
        top_p=own.top_p if given.top_p is None else given.top_p,
        max_new_tokens=longest,
        batch_size=own.batch_size,
        fold_system=isinstance(data, Corpus) and data.fold_system,
    )


def _as_json(
    found: Sequence[named.Named], asked: list[Messages], answers: list[Answers], given: argparse.Namespace
) -> None:
    for i, messages in enumerate(asked):
        for iterate, drawn in zip(found, answers, strict=True):
            answer, text = drawn[i]
            row = {"iterate": iterate.k, "messages": messages, "answer": text, "ids": answer.ids}
            row |= {"finish_reason": answer.finish_reason, "seed": given.seed or 0}
            print(json.dumps(row, ensure_ascii=False, allow_nan=False))


def _as_text(found: Sequence[named.Named], asked: list[Messages], answers: list[Answers]) -> None:
    if len(asked) == len(found) == 1:
        print(_harmless(answers[0][0][1]))
        return
    width = None if sys.stdout.isatty() else PIPED_WIDTH
    console = Console(highlight=False, width=width)
    table = Table(box=SIMPLE_HEAD, show_edge=False, show_lines=False, padding=(0, 1, 1, 1))
    table.add_column("prompt", ratio=1, overflow="fold")
    for iterate in found:
        table.add_column(Text(iterate.words), ratio=2, overflow="fold")
    for i, messages in enumerate(asked):
        texts = [messages[-1]["content"], *(drawn[i][1] + _cut(drawn[i][0]) for drawn in answers)]
        table.add_row(*(Text(_harmless(text)) for text in texts))
    console.print(table)


def _cut(answer: Any) -> str:
    return "" if answer.finish_reason == "stop" else " [cut off]"


def _harmless(text: str) -> str:
    """A text without the characters that tell a terminal to do something."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text
    )
