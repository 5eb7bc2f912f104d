"""MT-Bench's questions, references and prompts out of the user's files: read, checked, and rendered. No torch."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from spin_reg.corpora import Hub, Jsonl, Part
from spin_reg.errors import ConfigError, DataError
from spin_reg.mt_bench import Asked, Mode, MtBench, Prompt, Question

CATEGORY = re.compile(r"\w[\w .+-]*")  # it is part of a metric's name
OWN_PROMPTS = Path(__file__).parent / "judge_prompts.yaml"
Turn = Mapping[str, str | None]


def asked(settings: MtBench, prompts: str | None) -> Asked:
    """All questions, and what the judge is told.

    Raises:
        DataError: the questions or references cannot be used. ConfigError: the prompts cannot.
    """
    return Asked(read(settings), prompts_of(prompts))


def read(settings: MtBench) -> tuple[Question, ...]:
    """All questions of a source, in its order, each with the references that count."""
    assert settings.questions is not None
    where = settings.questions
    found: dict[str, Question] = {}
    for number, row in _rows(settings, where):
        try:
            question = _question(row, number)
        except ValueError as fault:
            raise _unusable(f"{where}, row {number}", str(fault), "questions") from fault
        if question.question_id in found:
            raise _unusable(f"{where}, row {number}", f"the id {question.question_id} stands there twice", "questions")
        found[question.question_id] = question
    if not found:
        raise _unusable(where, "it has no rows", "questions")
    if settings.references is None:
        return tuple(found.values())
    shown = _references(settings, settings.references, found)
    return tuple(
        Question(q.question_id, q.category, q.turns, shown.get(q.question_id, (None,) * len(q.turns)))
        for q in found.values()
    )


def _rows(settings: MtBench, path: str, *, of: str = "questions") -> Iterator[tuple[int, Any]]:
    """The rows of a file or a Hub data set, with their numbers from 1."""
    from spin_reg import rows

    part = Part(path=path)
    if part.is_file():
        if not Path(path).expanduser().is_file():
            todo = f"set evaluation.mt_bench.{of} to a file, or to a data set of the Hub"
            raise DataError(f"The file of {of} was not found.", where=path, why="no such file", todo=todo)
        source: Jsonl | Hub = Jsonl(path=path)
    else:
        source = Hub(path=path, subset=settings.subset, revision=settings.revision, split=settings.split)
    with rows.opened(source) as opened:
        for number, _, row in opened.scan(lambda done, total, unit: None):
            yield number, row


def _unusable(where: str, why: str, of: str) -> DataError:
    todo = "mend it; a row has question_id, category, turns, and reference where there is one"
    if of == "references":
        todo = "mend it; a row has question_id, and turns, or choices with turns as model answers have"
    return DataError(f"A row of the {of} cannot be used.", where=where, why=why, todo=todo)


def _question(row: Any, number: int) -> Question:
    """A row in the layout of MT-Bench's own file, or of its copies on the Hub (`prompt`, `prompt_id`)."""
    if not isinstance(row, dict):
        raise ValueError(f"it {row}" if isinstance(row, Exception) else "it is not an object with fields")
    turns = _texts(row.get("turns", row.get("prompt")), "turns")
    category = row.get("category")
    if not isinstance(category, str) or not CATEGORY.fullmatch(category):
        raise ValueError("it has no category, or none of letters and digits")
    given = _some_texts(row.get("reference"))
    if len(given) > len(turns):
        raise ValueError(f"it has {len(given)} references for {len(turns)} turns")
    own = (*given, *[None] * (len(turns) - len(given)))
    return Question(_id(row, number), category, turns, own)


def _id(row: Mapping[str, Any], number: int | None = None) -> str:
    own = next((row[key] for key in ("question_id", "prompt_id", "id") if row.get(key) is not None), number)
    if isinstance(own, bool) or not isinstance(own, int | str):
        raise ValueError("it has no question_id that is a number or a text")
    return str(own)


def _texts(value: Any, name: str) -> tuple[str, ...]:
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not listed or not all(isinstance(text, str) and text.strip() for text in listed):
        raise ValueError(f"its {name} is not a list of texts")
    return tuple(listed)


def _some_texts(value: Any) -> tuple[str | None, ...]:
    """References by turn; null and blank ones are none."""
    listed = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(listed, list) or not all(text is None or isinstance(text, str) for text in listed):
        raise ValueError("its reference is not a list of texts")
    return tuple(text if text is not None and text.strip() else None for text in listed)


def _references(settings: MtBench, path: str, known: Mapping[str, Question]) -> dict[str, tuple[str | None, ...]]:
    """The answers of a file by question: rows of `turns` or `reference`, or of model answers (`choices`)."""
    found: dict[str, tuple[str | None, ...]] = {}
    for number, row in _rows(settings, path, of="references"):
        try:
            if not isinstance(row, dict):
                raise ValueError("it is not an object with fields")
            name, choices = _id(row), row.get("choices")
            inner = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else row
            texts = _some_texts(inner.get("turns", inner.get("reference")))
            if name not in known:
                raise ValueError(f"there is no question {name}")
            if name in found:
                raise ValueError(f"the question {name} stands there twice")
            if len(texts) != len(known[name].turns):
                raise ValueError(f"question {name} has {len(known[name].turns)} turns, and this has {len(texts)}")
        except ValueError as fault:
            raise _unusable(f"{path}, row {number}", str(fault), "references") from fault
        found[name] = texts
    if not found:
        raise _unusable(path, "it has no rows", "references")
    return found


def prompts_of(path: str | None) -> dict[Mode, Prompt]:
    """The judge's prompts, from a YAML file with `single` and `pairwise`, each with `system` and `user`.

    Raises:
        ConfigError: it is not that, or a template leaves out what is to be judged.
    """
    file = OWN_PROMPTS if path is None else Path(path).expanduser()
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise _bad_prompts(file, " ".join(str(error).split())[:300]) from error
    found: dict[Mode, Prompt] = {}
    if not isinstance(content, dict) or set(content) != {mode.value for mode in Mode}:
        raise _bad_prompts(file, "it has not exactly `single` and `pairwise`")
    for mode in Mode:
        texts = content[mode.value]
        fields = {"system", "user"}
        if not isinstance(texts, dict) or set(texts) != fields or not all(isinstance(texts[f], str) for f in fields):
            raise _bad_prompts(file, f"{mode} has not exactly `system` and `user`, both texts")
        found[mode] = Prompt(texts["system"], texts["user"])
        _check_prompt(file, mode, found[mode])
    return found


def _bad_prompts(file: Path, why: str) -> ConfigError:
    todo = f"give a YAML file laid out as {OWN_PROMPTS}, or leave evaluation.judge.prompts out"
    return ConfigError("The judge's prompts cannot be used.", where=str(file), why=why, todo=todo)


def _check_prompt(file: Path, mode: Mode, prompt: Prompt) -> None:
    """Rendered, it must hold all that is to be judged, and say how a verdict is written."""
    from jinja2 import TemplateError

    names = ("answer",) if mode is Mode.single else ("answer_a", "answer_b")
    turns: list[dict[str, str | None]]
    turns = [{name: f"{name} {n}" for name in ("question", "reference", *names)} for n in (1, 2)]
    for reference in (True, False):
        if not reference:
            turns = [turn | {"reference": None} for turn in turns]
        try:
            text = "\n".join(message["content"] for message in messages(prompt, turns))
        except TemplateError as error:
            raise _bad_prompts(file, f"{mode}: {type(error).__name__}: {error}") from error
        needed = [turns[-1][name] for name in names] + [turn["question"] for turn in turns]
        missing = [name for name in (*needed, turns[-1]["reference"]) if name is not None and name not in text]
        if missing:
            raise _bad_prompts(file, f"{mode}: rendered for a second turn, it leaves out {', '.join(missing)}")
        if "[[" not in text:
            raise _bad_prompts(file, f"{mode}: it does not say that a verdict is written in [[double brackets]]")


@lru_cache(maxsize=8)
def _template(text: str) -> Any:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    jinja = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=False
    )
    return jinja.from_string(text)


def messages(prompt: Prompt, turns: Sequence[Turn]) -> list[dict[str, str]]:
    """What the judge is sent of a conversation whose last turn is to be judged."""
    given = {"turns": turns, "turn": turns[-1], "number": len(turns)}
    made = {role: _template(text).render(given) for role, text in vars(prompt).items()}
    return [{"role": role, "content": text} for role, text in made.items() if text.strip()]
