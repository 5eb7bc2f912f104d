"""The time that is left, from what a run's log says of its stages."""

import logging
import re

import pytest
from conftest import SMALL, Command
from test_estimate import ROWS, loaded

from spin_reg.amounts import limits
from spin_reg.context import EVERY, Logged
from spin_reg.estimate import pieces, work
from spin_reg.pace import Timed, duration, left, timed
from spin_reg.plan import Sources, plan

LOG = """2026-01-01 00:00:00,000 INFO spin_reg.runner: data: todo (not made yet)
2026-01-01 00:00:00,000 INFO spin_reg.runner: data: took {"seconds": 2.5, "peak_memory": 1}
2026-01-01 00:00:00,000 INFO spin_reg.runner: iteration-00/train: todo (not made yet)
2026-01-01 00:00:00,000 INFO context: iteration-00/train: at {"done": 3, "total": 12, "since": 1, "seconds": 8.0}
2026-01-01 00:00:00,000 INFO context: iteration-00/train: at {"done": 6, "total": 12, "since": 1, "seconds": 30.0}
"""


def test_a_log_tells_of_whole_stages_and_of_the_one_at_work() -> None:
    """5 of 12 steps took 30 s, so all would take 72 s, and half of them are left."""
    assert timed(LOG) == {"data": Timed(2.5, 0.0), "iteration-00/train": Timed(72.0, 0.5)}


def test_the_rest_of_a_stage_that_was_stopped_is_not_taken_for_all_of_it() -> None:
    more = "t INFO spin_reg.runner: iteration-00/train: todo (begun, goes on)\n"
    ended = 't INFO spin_reg.runner: iteration-00/train: took {"seconds": 9.0}\n'
    assert "iteration-00/train" not in timed(LOG + more + ended)
    again = "t INFO spin_reg.runner: iteration-00/train: todo (not made yet)\n"
    assert timed(LOG + more + ended + again + ended)["iteration-00/train"] == Timed(9.0, 0.0)


def test_what_is_left_goes_by_the_tokens_of_a_stage() -> None:
    words = ["model=pretrained", "model.name_or_path=m", "dataset=jsonl", "dataset.path=x.jsonl", "evaluation=none"]
    stages = plan(loaded(*words, "regularizer=none"), Sources(model="m", tokenizer="t", data="d"))
    first = next(stage for stage in stages if stage.kind == "train")
    line = f'x INFO r: {first.name}: took {{"seconds": 10.0}}\n'
    todo = stages[stages.index(first) + 1 :]
    have = limits(loaded(*words).dataset, ROWS)
    listed = pieces(stages, have)
    found = left(listed, {stage.name for stage in todo}, line)
    trained = [work([stage], have).tokens for stage in stages if stage.kind == "train"]
    assert found.seconds == pytest.approx(10 * sum(trained[1:]) / trained[0])
    assert found.timed == ("train",) and found.unknown == ("generate", "score")
    assert "generate, score not timed yet" in found.words()
    half = f'x INFO r: {first.name}: at {{"done": 5, "total": 10, "since": 3, "seconds": 2.0}}\n'
    assert left(listed, {first.name}, half).seconds == pytest.approx(5.0)
    assert "not known" in left(listed, {stage.name for stage in stages}, "").words()
    assert left(listed, set(), "").words() == "nothing left"


def test_the_log_is_told_from_time_to_time(caplog: pytest.LogCaptureFixture) -> None:
    now, heard = [0.0], []
    told = Logged("s", lambda *at: heard.append(at), lambda: now[0])
    with caplog.at_level(logging.INFO):
        for done in range(4, 10):  # 4 were there before
            told(done, 9, "step")
            now[0] += EVERY / 2
    assert [at[0] for at in heard] == list(range(4, 10))
    assert len(caplog.messages) == 2
    (found,) = timed("".join(f": {line}\n" for line in caplog.messages)).values()
    assert found == Timed(9 * EVERY / 2, pytest.approx(1 / 9))


@pytest.mark.slow
def test_plan_says_how_long_it_may_take(command: Command, tmp_path) -> None:  # type: ignore[no-untyped-def]
    words = [*SMALL, f"outputs={tmp_path}", "run_name=run", "regularizer=none"]
    assert "time: not known" in command("plan", *words).out
    assert command("train", *words).code == 0
    assert "time: nothing left" in command("plan", *words).out
    told = command("plan", *words, "schedule.iterations=4").out
    assert re.search(r"time: about \d+ s left, at the pace so far$", told, flags=re.M), told


def test_durations_as_people_say_them() -> None:
    assert [duration(s) for s in (0.2, 90, 150, 7300, 300000)] == ["0 s", "90 s", "2.5 min", "2.03 h", "3.47 days"]
