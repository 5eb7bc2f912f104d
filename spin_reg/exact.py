"""Exact match: what a regex finds in an answer, compared with what it finds in the real one; no judge is asked."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from spin_reg.errors import DataError
from spin_reg.settings import check, positive


@dataclass
class ExactMatch:
    """Whether held-out answers come to the result that the real ones come to.

    `regex`: its one group is the result, and the last match in an answer counts; null: no exact match. `real_regex`:
    that for real answers; null: the same. `normalise`: see `result`. `temperature` 0: greedy answers, drawn for
    this alone. `max_new_tokens`: null, as in the game.
    """

    regex: str | None = None
    real_regex: str | None = None
    normalise: bool = True
    temperature: float = 0.0
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        for key in ("regex", "real_regex"):
            _check_regex(f"evaluation.exact_match.{key}", getattr(self, key))
        ok = 0 <= self.temperature < float("inf")
        check(ok, f"evaluation.exact_match.temperature={self.temperature}: give 0 (greedy) or a number above")
        positive(evaluation__exact_match__max_new_tokens=self.max_new_tokens)
        off = {"real_regex": None, "normalise": True, "temperature": 0.0, "max_new_tokens": None}
        for key, value in off.items():
            given = getattr(self, key)
            ok = self.regex is not None or given == value
            message = f"evaluation.exact_match.{key}={given}: without a regex it does nothing; set "
            check(ok, message + "evaluation.exact_match.regex")


def _check_regex(key: str, regex: str | None) -> None:
    try:
        groups = 1 if regex is None else re.compile(regex).groups
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{key}={regex}: it is no regular expression of Python ({error})") from error
    check(groups == 1, f"{key}={regex}: it has {groups} groups; give it one, (...), around the result")


def result(settings: ExactMatch, text: str, *, real: bool = False) -> str | None:
    """What the last match's group holds; None where there is no match, or it holds nothing.

    Normalised: without `,` and `$`, blanks and dots at its end, in lower case. So 1,000. is $1000; 18.50 is not 18.5.
    """
    regex = settings.real_regex if real and settings.real_regex is not None else settings.regex
    assert regex is not None
    found: str | None = None
    for match in re.finditer(regex, text):
        found = match[1] if match[1] is not None else found
    if found is not None and settings.normalise:
        found = found.replace(",", "").replace("$", "").strip().rstrip(".").rstrip().casefold()
    return found or None


def wanted(settings: ExactMatch, real: Mapping[str, str]) -> dict[str, str]:
    """The results of real answers, by example_id; answers that have none are left out.

    Raises:
        DataError: not even most of them have one.
    """
    found = {name: result(settings, text, real=True) for name, text in real.items()}
    results = {name: value for name, value in found.items() if value is not None}
    if 2 * len(results) <= len(real):
        key = "regex" if settings.real_regex is None else "real_regex"
        shown = " ".join(next((real[name] for name in real if name not in results), "").split())[-80:]
        raise DataError(
            "The real answers have no result to be matched.",
            where=f"evaluation.exact_match.{key}={getattr(settings, key)}",
            why=f"it finds something in {len(results)} of {len(real)} held-out real answers; not in: {shown}",
            todo="change the regex, or give real answers one of their own: evaluation.exact_match.real_regex",
        )
    return results
