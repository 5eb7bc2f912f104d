"""Calls to a judge over an OpenAI-compatible address: many at a time, retried, each kept on disk once it is answered.

One POST and one field of its answer are all that is needed, so a plain HTTP client does it: what is tried again, after
how long, and what is kept are then ours to say.
"""

import logging
import os
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from typing import Any

from spin_reg import judging
from spin_reg.errors import ConfigError, SpinRegError
from spin_reg.judging import Call, Cost
from spin_reg.mt_bench import Judge
from spin_reg.redact import redacted
from spin_reg.replies import Cache, Reply

EVERY = 0.2  # seconds between two looks at whether to stop
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before the second try, and before the last
LONGEST_ASKED = 600.0  # seconds; a server that asks for more patience is given up
BUSY = {408, 409, 425, 429}  # and every 5xx: trying again may help
log = logging.getLogger(__name__)


@dataclass
class Spent:
    """What one run of a command has asked for so far."""

    calls: int = 0
    cost: float = 0.0


spent = Spent()


def begin() -> None:
    """A run of a command begins: its limits count from here."""
    spent.calls, spent.cost = 0, 0.0


def check(judge: Judge) -> None:
    """Raise ConfigError where the client or the key is missing."""
    if find_spec("httpx2") is None:
        raise ConfigError(
            "The client of the judge is not installed.",
            where="evaluation.mt_bench",
            why="a judge is called by the package httpx2, which is an extra",
            todo="pip install spin-reg[judge], or leave MT-Bench out",
        )
    key = os.environ.get(judge.key_variable, "") if judge.key_variable is not None else "none"
    if not key or not key.isascii() or not key.isprintable():
        what = f"the environment variable {judge.key_variable} " + ("is not a key" if key else "is not set")
        raise ConfigError(
            "The judge's key is missing.",
            where=f"evaluation.judge.key_variable={judge.key_variable}",
            why=f"{what}, and keys are read from the environment alone",
            todo=f"export {judge.key_variable}=..., or set evaluation.judge.key_variable=null where no key is needed",
        )


def check_limits(judge: Judge, expected: Cost, where: str = "what is still to be judged") -> None:
    """Raise ConfigError where so much more would be over the limits."""
    calls, money = spent.calls + expected.calls, expected.money(judge)
    over: list[tuple[str, float, str]] = []
    if judge.max_calls is not None and expected.calls and calls > judge.max_calls:
        over.append(("max_calls", judge.max_calls, f"{calls} calls"))
    if judge.max_cost is not None and money and spent.cost + money > judge.max_cost:
        over.append(("max_cost", judge.max_cost, f"up to {spent.cost + money:.4g}"))
    for name, limit, needed in over:
        raise ConfigError(
            "The judge would cost more than is allowed.",
            where=f"evaluation.judge.{name}={limit}",
            why=f"{where} needs {needed}, beside {expected.cached} calls that are answered already",
            todo=f"raise evaluation.judge.{name}, or ask for less: evaluation.mt_bench.limit, evaluation.judge.modes",
        )


def ask(
    judge: Judge, calls: Sequence[Call], cache: Cache, *, poll: Callable[[], None], progress: Callable[[int, int], None]
) -> dict[str, Reply]:
    """The reply to every call, by its key, from the cache or from the judge.

    Raises:
        ConfigError: what is missing is over the limits. SpinRegError: the judge refuses a call, or was given up. What
        `poll` raises. Whatever it is, what was answered is kept.
    """
    different = {call.key: call for call in calls}
    found = {key: reply for key in different if (reply := cache.read(key)) is not None}
    missing = [call for key, call in different.items() if key not in found]
    expected = judging.cost(judge, calls, found.__contains__)
    check_limits(judge, expected, "this stage")
    log.info("%s", words(judge, expected))
    progress(len(found), len(different))
    if missing:
        import asyncio

        def answered(call: Call, reply: Reply) -> None:
            cache.keep(call, reply)
            found[call.key] = reply
            progress(len(found), len(different))

        asyncio.run(_ask_all(judge, missing, answered, poll))
    return found


def words(judge: Judge, expected: Cost) -> str:
    """What is going to be asked, for people."""
    written = "an unknown number of" if expected.written is None else f"at most {expected.written}"
    money = expected.money(judge)
    text = f"{expected.calls} calls to {judge.model} at {judge.host} ({expected.cached} more are in the cache): about "
    text += f"{expected.read} tokens read, {written} written"
    return text + ("" if money is None else f", at most {money:.4g} to pay")


async def _ask_all(
    judge: Judge, calls: Sequence[Call], answered: Callable[[Call, Reply], None], poll: Callable[[], None]
) -> None:
    import asyncio

    import httpx2

    key = os.environ[judge.key_variable] if judge.key_variable is not None else None
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    limits = httpx2.Limits(max_connections=judge.concurrency)
    waiting, running = list(reversed(calls)), dict[asyncio.Task[Reply], Call]()
    async with httpx2.AsyncClient(headers=headers, timeout=None, limits=limits) as client:
        try:
            while waiting or running:
                poll()
                while waiting and len(running) < judge.concurrency and _may_start(judge, waiting[-1], running.values()):
                    call = waiting.pop()
                    running[asyncio.create_task(_one(client, judge, call))] = call
                if not running:
                    raise _over(judge, len(waiting))
                done, _ = await asyncio.wait(running, timeout=EVERY, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(done, key=lambda task: task.exception() is not None):  # keep first, then fail
                    call = running.pop(task)
                    reply = task.result()
                    spent.calls += 1
                    spent.cost += judging.price(judge, *_used(judge, call, reply))
                    answered(call, reply)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


def _used(judge: Judge, call: Call, reply: Reply) -> tuple[int, int]:
    """Tokens that a call took, as counted by the judge, else about."""
    about = len(reply.text) // judging.CHARACTERS + 1
    return call.tokens if reply.read is None else reply.read, about if reply.written is None else reply.written


def _may_start(judge: Judge, call: Call, running: Any) -> bool:
    """Whether one more call keeps the limits, whatever those at work will cost."""
    at_work = [*running, call]
    if judge.max_calls is not None and spent.calls + len(at_work) > judge.max_calls:
        return False
    worst = judging.price(judge, sum(c.tokens for c in at_work), (judge.longest or 0) * len(at_work))
    return judge.max_cost is None or spent.cost + worst <= judge.max_cost


def _over(judge: Judge, left: int) -> SpinRegError:
    calls = judge.max_calls is not None and spent.calls >= judge.max_calls
    name = "max_calls" if calls else "max_cost"
    return SpinRegError(
        "The judge has reached what it may cost.",
        where=f"evaluation.judge.{name}={getattr(judge, name)}",
        why=f"{spent.calls} calls were answered and cost {spent.cost:.4g}; {left} are left",
        todo="raise the limit and run the same command again: what was answered is kept, and costs nothing",
    )


class _Fault(Exception):
    """A try that came to nothing and may come to something later; `wait`: what the server asked for, in seconds."""

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


async def _one(client: Any, judge: Judge, call: Call) -> Reply:
    """One call, tried again while that may help."""
    import asyncio

    why = ""
    for attempt in range(judge.retries + 1):
        try:
            return await _try(client, judge, call)
        except _Fault as fault:
            why = redacted(str(fault))
            backoff = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1.0)
            wait = backoff if fault.wait is None else fault.wait
            if attempt == judge.retries or wait > LONGEST_ASKED:
                break
            tries = f"try {attempt + 1} of {judge.retries + 1}"
            log.log(logging.WARNING if attempt == 2 else logging.INFO, "the judge: %s (%s)", why, tries)
            await asyncio.sleep(wait)
    raise SpinRegError(
        "The judge does not answer.",
        where=f"{judge.model} at {judge.host}, question {call.question_id}, turn {call.turn}",
        why=f"{attempt + 1} tries; the last: {why}",
        todo="see to it and run the same command again: what was answered is kept, and costs nothing",
    )


async def _try(client: Any, judge: Judge, call: Call) -> Reply:
    import asyncio

    import httpx2

    address = f"{str(judge.base_url).rstrip('/')}/chat/completions"
    try:
        async with asyncio.timeout(judge.timeout):
            response = await client.post(address, json=dict(call.body))
    except TimeoutError as error:
        raise _Fault(f"no answer within {judge.timeout:g} s") from error
    except httpx2.RequestError as error:
        raise _Fault(f"{type(error).__name__}: {error}".rstrip(": ")) from error
    status = response.status_code
    if status in BUSY or status >= 500:
        raise _Fault(f"status {status}: {_said(response.text)}", _asked_wait(response.headers))
    if status != 200:
        raise SpinRegError(
            "The judge refuses.",
            where=f"{judge.model} at {judge.host}",
            why=f"status {status}: {_said(response.text)}",
            todo="look at evaluation.judge (model, base_url, body) and at the key; what was answered is kept",
        )
    return _reply(judge, response)


def _said(text: str) -> str:
    """What a server said, on one line, short and without secrets."""
    return redacted(" ".join(text.split()))[:300] or "nothing"


def _asked_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait, by Retry-After: a number of them, or a date."""
    from email.utils import parsedate_to_datetime

    value = headers.get("retry-after", "")
    with suppress(ValueError):
        return max(0.0, float(value)) if float(value) == float(value) else None
    with suppress(ValueError, TypeError):
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    return None


def _reply(judge: Judge, response: Any) -> Reply:
    """The reply in a chat completion; anything else is nonsense, which may pass."""
    try:
        found = response.json()
        choice = found["choices"][0]
        text = choice["message"].get("content")
        if not isinstance(text, str | None):
            raise TypeError(f"content is a {type(text).__name__}")
        usage = found.get("usage") or {}
        read, written = usage.get("prompt_tokens"), usage.get("completion_tokens")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        why = f"an answer that is no chat completion ({type(error).__name__}): {_said(response.text)}"
        raise _Fault(why) from error
    return Reply(
        text=redacted(text or ""),  # None: it said nothing
        finish_reason=_text(choice.get("finish_reason")),
        model=_text(found.get("model")),
        read=read if type(read) is int else None,
        written=written if type(written) is int else None,
        host=judge.host,
        time=datetime.now(UTC).isoformat(timespec="milliseconds"),
    )


def _text(value: Any) -> str | None:
    return redacted(value) if isinstance(value, str) else None
