"""The settings of MT-Bench (arXiv 2306.05685) and its judge, and its questions as values."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

from spin_reg import redact
from spin_reg.fingerprint import digest
from spin_reg.settings import check, positive, runtime

TEMPERATURES = {  # by category, as MT-Bench sets them
    **{"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0},
    **{"stem": 0.1, "humanities": 0.1},
}
OURS = {"model", "messages", "stream", "n"}  # fields of a request that are not the user's to set


class Mode(StrEnum):
    """How a judge sees an answer: alone, with a grade from 1 to 10; or beside the base's."""

    single = "single"
    pairwise = "pairwise"


@dataclass
class MtBench:
    """The questions, from a file or a Hub data set (null: no MT-Bench), and how an iterate answers them.

    `references`: a file whose answers the judge is shown in place of the questions' own. `temperatures`: by category,
    where they are to differ from MT-Bench's, 0 is greedy; `temperature`: of categories that it does not know. `limit`:
    only the first so many questions, for trying out.
    """

    questions: str | None = runtime(None)  # what is in it counts, by content
    subset: str | None = runtime(None)
    revision: str | None = runtime(None)
    split: str = runtime("train")
    references: str | None = runtime(None)
    temperatures: Any = None
    temperature: float = 0.7
    max_new_tokens: int = 1024
    limit: int | None = None

    def __post_init__(self) -> None:
        key = "evaluation.mt_bench"
        positive(evaluation__mt_bench__max_new_tokens=self.max_new_tokens, evaluation__mt_bench__limit=self.limit)
        given = {} if self.temperatures is None else self.temperatures
        check(isinstance(given, dict), f"{key}.temperatures={given}: give categories and numbers as {{math: 0.0}}")
        for name, value in {"temperature": self.temperature, **given}.items():
            ok = isinstance(value, int | float) and math.isfinite(value) and value >= 0
            check(ok, f"{key}.temperatures: {name} has {value}: give 0 (greedy) or a number above it")

    @property
    def by_category(self) -> dict[str, float]:
        """The temperature of each category that has one of its own."""
        return TEMPERATURES | {str(name): float(value) for name, value in (self.temperatures or {}).items()}


@dataclass
class Judge:
    """Who judges, over an OpenAI-compatible address, and what that may cost.

    `key_variable`: the environment variable that holds the key; null: none is sent. `prompts`: a YAML file in place of
    our own. `temperature` and `max_tokens` null: not sent. `body`: more fields of every request, null takes one out.
    `repeats`: how often each verdict is asked for. `timeout`: seconds of one call. `price_in`, `price_out`: per million
    tokens. `max_calls`, `max_cost`: the most that one run of a command may ask for; calls in the cache are free.
    """

    base_url: str | None = runtime(None)
    model: str | None = None
    key_variable: str | None = runtime("OPENAI_API_KEY")
    modes: list[Mode] = field(default_factory=lambda: list(Mode), metadata={"runtime": True})  # each is its own stage
    prompts: str | None = runtime(None)  # their texts count, by content
    temperature: float | None = 0.0
    max_tokens: int | None = 2048
    body: Any = None
    repeats: int = 1
    concurrency: int = runtime(8)
    timeout: float = runtime(120.0)
    retries: int = runtime(6)
    price_in: float | None = runtime(None)
    price_out: float | None = runtime(None)
    max_calls: int | None = runtime(None)
    max_cost: float | None = runtime(None)

    def __post_init__(self) -> None:
        key = "evaluation.judge"
        positive(evaluation__judge__repeats=self.repeats, evaluation__judge__concurrency=self.concurrency)
        positive(evaluation__judge__max_tokens=self.max_tokens)
        for name in ("temperature", "price_in", "price_out", "max_calls", "max_cost", "retries"):
            number: float | None = getattr(self, name)
            ok = number is None or (math.isfinite(number) and number >= 0)
            check(ok, f"{key}.{name}={number}: give a number from 0")
        ok = math.isfinite(self.timeout) and self.timeout > 0
        check(ok, f"{key}.timeout={self.timeout}: give seconds above 0")
        ok = self.body is None or (isinstance(self.body, dict) and not OURS & set(self.body))
        check(ok, f"{key}.body: give names and values of request fields, but none of {', '.join(sorted(OURS))}")
        ok = bool(self.modes) and len(set(self.modes)) == len(self.modes)
        check(ok, f"{key}.modes={[str(mode) for mode in self.modes]}: give single, pairwise or both, each once")
        self._check_address()
        variable = self.key_variable  # not echoed: somebody may have put the key itself there
        ok = variable is None or bool(re.fullmatch(r"[A-Za-z_]\w*", variable) and redact.named_secret(variable))
        message = f"give the name of an environment variable with one of {', '.join(redact.NAMES)} in it (so that its "
        check(ok, f"{key}.key_variable: {message}value is masked everywhere), or null where no key is needed")
        prices = self.price_in is not None and self.price_out is not None and self.longest is not None
        ok = self.max_cost is None or prices
        check(
            ok,
            f"{key}.max_cost={self.max_cost}: what a call may cost is not known; set price_in, price_out, max_tokens",
        )

    def _check_address(self) -> None:
        if self.base_url is None:
            return
        try:
            parts = urlsplit(self.base_url)
            ok = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query and not parts.fragment
            ok = ok and parts.port != 0
        except ValueError:
            ok = False
        check(ok, "evaluation.judge.base_url: give an address as https://HOST/v1, without a query")

    @property
    def longest(self) -> int | None:
        """The most tokens that a verdict may have; None where nothing says so."""
        given = [(self.body or {}).get(name) for name in ("max_completion_tokens", "max_tokens")]
        return next((value for value in (*given, self.max_tokens) if isinstance(value, int)), None)

    @property
    def host(self) -> str:
        """Where the judge is, without the rest of its address."""
        parts = urlsplit(str(self.base_url))
        return str(parts.hostname) + (f":{parts.port}" if parts.port else "")


def check_together(enabled: bool, asked: MtBench, judge: Judge) -> None:
    """Raise ValueError where a setting has no effect, or one that MT-Bench needs is missing."""
    if asked.questions is not None:
        check(enabled, "evaluation.enabled=false: it leaves evaluation.mt_bench without effect; leave one of them out")
        for name in ("model", "base_url"):
            given = "the judge's name at its address" if name == "model" else "its address, as https://HOST/v1"
            missing = f"evaluation.judge.{name}: MT-Bench is judged by a model; give {given}"
            check(getattr(judge, name) is not None, missing)
        return
    for group, value, off in (("mt_bench", asked, MtBench()), ("judge", judge, Judge())):
        for name in (f.name for f in fields(off)):
            ok = getattr(value, name) == getattr(off, name)
            check(ok, f"evaluation.{group}.{name}: without evaluation.mt_bench.questions it does nothing; set that too")


@dataclass(frozen=True)
class Question:
    """A question in turns; `references`: by turn, None where the judge is shown none."""

    question_id: str
    category: str
    turns: tuple[str, ...]
    references: tuple[str | None, ...]


@dataclass(frozen=True)
class Prompt:
    """What a judge is told: two Jinja templates, `system` may be empty."""

    system: str
    user: str


@dataclass(frozen=True)
class Asked:
    """What MT-Bench is by content: all questions, and the prompts of the judge by mode."""

    questions: tuple[Question, ...]
    prompts: Mapping[Mode, Prompt]

    @property
    def turns_sha256(self) -> str:
        """What is asked."""
        return digest([[question.question_id, question.category, question.turns] for question in self.questions])

    @property
    def references_sha256(self) -> str:
        """What the judge is shown beside it."""
        return digest([[question.question_id, question.references] for question in self.questions])

    def prompts_sha256(self, mode: Mode) -> str:
        """What the judge is told."""
        return digest(self.prompts[mode])
