"""What a judge is asked, how its words become verdicts, and what verdicts say of an iterate. No torch, no network."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from statistics import fmean, stdev
from typing import Any

from spin_reg import questions
from spin_reg.fingerprint import digest
from spin_reg.mt_bench import Judge, Mode, Prompt, Question

CHARACTERS = 3  # of a token, for estimates: fewer than English has, so that they err on the high side
GRADE = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")
LETTER = re.compile(r"\[\[\s*([ABC])\s*\]\]")
THOUGHT = "</think>"  # what stands before it is thinking aloud, and no verdict
PREFIX = "eval/mt_bench"
Answers = Mapping[str, Sequence[str]]  # by question, one a turn
Values = dict[str, float]


@dataclass(frozen=True)
class Call:
    """One question to the judge. `turn` and `repeat` count from 1; `flipped`: the iterate's answer is B, else A.

    `body`: the request, but for what only the address knows.
    """

    question_id: str
    category: str
    turn: int
    repeat: int
    flipped: bool
    body: Mapping[str, Any]

    @property
    def key(self) -> str:
        """What a call is cached by: the whole request, and which repeat it is."""
        return digest(["chat/completions", self.body, self.repeat])

    @property
    def tokens(self) -> int:
        """What the judge reads, about, and rather too many."""
        return ceil(sum(len(message["content"]) for message in self.body["messages"]) / CHARACTERS)


def calls(
    judge: Judge, prompt: Prompt, asked: Sequence[Question], answers: Answers, opponent: Answers | None = None
) -> list[Call]:
    """Every call: of each question, turn and repeat one; against an opponent's answers two, in both orders."""
    made = []
    for question in asked:
        for turn in range(1, len(question.turns) + 1):
            for flipped in (False,) if opponent is None else (False, True):
                shown = [dict(_turn(question, n, answers, opponent, flipped)) for n in range(turn)]
                body = request(judge, questions.messages(prompt, shown))
                for repeat in range(1, judge.repeats + 1):
                    made.append(Call(question.question_id, question.category, turn, repeat, flipped, body))
    return made


def _turn(
    question: Question, n: int, answers: Answers, opponent: Answers | None, flipped: bool
) -> Iterable[tuple[str, str | None]]:
    yield "question", question.turns[n]
    yield "reference", question.references[n]
    own = answers[question.question_id][n]
    if opponent is None:
        yield "answer", own
    else:
        other = opponent[question.question_id][n]
        yield from zip(("answer_a", "answer_b"), (other, own) if flipped else (own, other), strict=True)


def request(judge: Judge, messages: list[dict[str, str]]) -> dict[str, Any]:
    """The body of a chat completion; null in `judge.body` takes a field out."""
    body = {
        "model": judge.model,
        "messages": messages,
        "temperature": judge.temperature,
        "max_tokens": judge.max_tokens,
    }
    return {name: value for name, value in (body | (judge.body or {})).items() if value is not None}


@dataclass(frozen=True)
class Verdict:
    """`value`: the grade, or 1, 1/2, 0 where the first answer is better, as good, worse. None: `fault` says why."""

    value: float | None
    fault: str = ""


def verdict(mode: Mode, text: str) -> Verdict:
    """The one verdict that a judge's words hold; different ones are none, since nobody knows which was meant."""
    said = text.rpartition(THOUGHT)[2]
    pattern = GRADE if mode is Mode.single else LETTER
    found = {float(word) if mode is Mode.single else word for word in pattern.findall(said)}
    if not found:
        return Verdict(None, "no verdict")
    if len(found) > 1:
        return Verdict(None, "several verdicts")
    (one,) = found
    if isinstance(one, float):
        return Verdict(one) if 1 <= one <= 10 else Verdict(None, "out of range")
    return Verdict({"A": 1.0, "C": 0.5, "B": 0.0}[one])


@dataclass(frozen=True)
class Score:
    """What an answer got: a grade, or 1, 1/2, 0 for a win, a tie, a loss; None where no verdict could be read.

    `agree`: both orders gave the same verdict (of a grade, always).
    """

    question_id: str
    category: str
    turn: int
    repeat: int
    value: float | None
    agree: bool = True


def scores(mode: Mode, asked: Sequence[Call], verdicts: Sequence[Verdict]) -> list[Score]:
    """Grades as they are. Of a pair both orders: a win only where it wins in both, a loss only where it loses in both,
    else a tie, so that a judge who likes the first place gives nothing; without either verdict there is none.
    """
    found: dict[tuple[str, int, int], list[float | None]] = {}
    where: dict[tuple[str, int, int], Call] = {}
    for call, one in zip(asked, verdicts, strict=True):
        key = (call.question_id, call.turn, call.repeat)
        where[key] = call
        own = None if one.value is None else 1 - one.value if call.flipped else one.value
        found.setdefault(key, []).append(own)
    made = []
    for key, values in found.items():
        read = [value for value in values if value is not None]
        agree = len(set(read)) == 1
        value = None if len(read) < len(values) else read[0] if agree else 0.5
        call = where[key]
        made.append(Score(call.question_id, call.category, call.turn, call.repeat, value, agree or value is None))
    return made


def mean(name: str, given: Sequence[Score]) -> Values:
    """The mean over questions of each question's mean over its turns and repeats, with its standard error over
    questions (turns and repeats of one question are not independent): s / sqrt(n), with n - 1 in s; none where n is 1.
    """
    by_question: dict[str, list[float]] = {}
    for score in given:
        if score.value is not None:
            by_question.setdefault(score.question_id, []).append(score.value)
    means = [fmean(values) for values in by_question.values()]
    if not means:
        return {}
    return {name: fmean(means)} | ({f"{name}_se": stdev(means) / sqrt(len(means))} if len(means) > 1 else {})


def spread(given: Sequence[Score]) -> float | None:
    """The standard deviation of the means that each repeat gives by itself; None of fewer than two."""
    repeats = sorted({score.repeat for score in given})
    means = [mean("m", [score for score in given if score.repeat == repeat]).get("m") for repeat in repeats]
    known = [value for value in means if value is not None]
    return stdev(known) if len(known) > 1 else None


def summary(mode: Mode, given: Sequence[Score]) -> Values:
    """eval/mt_bench/score (grades) or win_rate (wins and half the ties): in all, by turn, by category; each with its
    standard error over questions; `_repeat_sd`: see `spread`.
    """
    name = f"{PREFIX}/{'score' if mode is Mode.single else 'win_rate'}"
    values = mean(name, given)
    between = spread(given)
    values |= {} if between is None else {f"{name}_repeat_sd": between}
    for turn in sorted({score.turn for score in given}):
        values |= mean(f"{name}_turn_{turn}", [score for score in given if score.turn == turn])
    for category in dict.fromkeys(score.category for score in given):
        values |= mean(f"{name}/{category}", [score for score in given if score.category == category])
    return values


def counts(mode: Mode, given: Sequence[Score], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """How many answers were to be judged and were, and how many verdicts could not be read, with the reasons."""
    read = [score for score in given if score.value is not None]
    found: dict[str, Any] = {"asked": len(given), "judged": len(read), "verdicts": len(verdicts)}
    faults = Counter(one.fault for one in verdicts if one.value is None)
    found |= {"unparsable": sum(faults.values()), "faults": dict(sorted(faults.items()))}
    if mode is Mode.pairwise:
        outcomes = Counter(score.value for score in read)
        found |= {"wins": outcomes[1.0], "ties": outcomes[0.5], "losses": outcomes[0.0]}
        found |= {"inconsistent": sum(not score.agree for score in read)}
    return found


@dataclass(frozen=True)
class Cost:
    """Calls and tokens. `cached` calls are none of the others. `written`: None where nothing limits a verdict."""

    calls: int = 0
    cached: int = 0
    read: int = 0
    written: int | None = 0

    def money(self, judge: Judge) -> float | None:
        """In the currency of the prices; None where they are not known."""
        if judge.price_in is None or judge.price_out is None or self.written is None:
            return None
        return price(judge, self.read, self.written)

    def plus(self, other: "Cost") -> "Cost":
        written = None if self.written is None or other.written is None else self.written + other.written
        return Cost(self.calls + other.calls, self.cached + other.cached, self.read + other.read, written)


def price(judge: Judge, read: int, written: int) -> float:
    """What so many tokens cost; nothing where there are no prices."""
    return ((judge.price_in or 0.0) * read + (judge.price_out or 0.0) * written) / 1e6


def cost(judge: Judge, asked: Sequence[Call], cached: Callable[[str], bool]) -> Cost:
    """What calls cost at most; one that stands among them twice is asked once, one in the cache is free."""
    different = {call.key: call for call in asked}
    new = [call for key, call in different.items() if not cached(key)]
    written = None if judge.longest is None else judge.longest * len(new)
    return Cost(len(new), len(asked) - len(new), sum(call.tokens for call in new), written)
