"""`schedule.stop_when`: a game that gets worse ends, says why, counts as finished, and goes on when told to."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, Command, read_jsonl
from test_config import composed

from spin_reg import durable, outlook, results, rundir, runner, space
from spin_reg.context import Context
from spin_reg.errors import ConfigError
from spin_reg.metrics import StopWhen
from spin_reg.plan import Sources, Stage, plan
from spin_reg.settings import Schedule
from spin_reg.specs import EvaluateSpec
from spin_reg.stages import evaluate

RULE = "schedule.stop_when={metric:eval/heldout_nll,worse:2}"
SOURCES = Sources(model=None, tokenizer="t", data=None)
CURVE = [5.0, 4.0, 4.5, 4.625, 3.0, 2.0]


@pytest.fixture
def curve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out NLL as in CURVE, whatever the models do."""
    real = evaluate.likelihood
    monkeypatch.setattr(evaluate, "likelihood", lambda inputs, k: real(inputs, k) | {"eval/heldout_nll": CURVE[k]})


def evaluations(root: Path) -> list[int]:
    return [row["iterate"] for row in read_jsonl(root / "metrics.jsonl") if "iterate" in row]


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_a_game_that_gets_worse_twice_ends_and_goes_on_when_told_to(
    curve: None, command: Command, tmp_path: Path
) -> None:
    root, words = tmp_path / "run", [*SMALL, f"outputs={tmp_path}", "run_name=run", "schedule.iterations=5", RULE]
    why = "after iterate 3: eval/heldout_nll got worse 2 times in a row: 4 (iterate 1), 4.5 (iterate 2), "
    why += "4.625 (iterate 3)"
    result = command("train", *words)
    assert result.code == 0, result.err
    assert f"stopped  {why}" in result.err and f"resume {root} schedule.stop_when=null" in result.err
    assert f"stopped {why}" in (root / "run.log").read_text()
    said = json.loads((root / "stopped.json").read_text())
    assert said == {"iterate": 3, "metric": "eval/heldout_nll", "values": [4.0, 4.5, 4.625], "why": why}
    assert evaluations(root) == [0, 1, 2, 3] and not (root / "iteration-03").exists()

    before = files(root)
    again = command("train", *words)
    assert again.code == 0 and "is finished: nothing to do" in again.err and f"stopped  {why}" in again.err
    assert files(root) == before
    planned = command("plan", *words)
    assert "todo" not in planned.out and f"stopped {why}" in planned.out
    judged = command("evaluate", str(root), "evaluation.num_samples=3")
    assert judged.code == 0 and f"stopped  {why}" in judged.err
    assert len(json.loads((root / "iterate-03/evaluate/samples.json").read_text())) == 3
    assert json.loads((root / "stopped.json").read_text()) == said
    (root / "stopped.json").unlink()  # as after a kill just before it was written
    assert command("resume", str(root)).code == 0
    assert json.loads((root / "stopped.json").read_text()) == said and evaluations(root) == [0, 1, 2, 3]

    on = command("resume", str(root), "schedule.stop_when=null")
    assert on.code == 0, on.err
    assert "stopped" not in on.err and not (root / "stopped.json").exists()
    assert evaluations(root) == [0, 1, 2, 3, 4, 5]
    result = command("train", *words, "evaluation.num_samples=3")  # with the rule again: what was played stays
    assert result.code == 0 and "is finished: nothing to do" in result.err and "stopped" not in result.err
    assert evaluations(root) == [0, 1, 2, 3, 4, 5]


def test_a_game_that_ended_keeps_what_one_more_iteration_needs() -> None:
    words = ("regularizer=mixture_of_two", "keep_iterates=needed")
    long, short, sources = composed(*words, "schedule.iterations=6"), composed(*words, "schedule.iterations=3"), SOURCES
    stop = results.Stop(3, "eval/heldout_nll", (1.0,))
    made = outlook.Planned(long, Path(), Path(), sources, [], [], True, stop=stop)
    assert made.future == space.future(short, sources) != space.future(long, sources)
    assert {"iteration-01/train", "iteration-02/train"} <= made.future  # iterates 2 and 3


class Quiet:
    """Hears nothing, keeps nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args: None


def played(root: Path, curve: list[float], iterations: int, rule: StopWhen | None) -> list[int]:
    """The iterates that a run with stub stages and this curve evaluates."""
    words = ("regularizer=mixture_of_two", f"schedule.iterations={iterations}")
    stages = plan(composed(*words), SOURCES)
    seen = []

    def stub(stage: Stage, inputs: dict[str, Path], work: Path, context: Context) -> None:
        durable.write_bytes(work / "result", stage.fingerprint.encode())
        if isinstance(stage.spec, EvaluateSpec):
            seen.append(stage.spec.k)
            durable.write_json(work / "metrics.json", {"eval/heldout_real_logprob": curve[stage.spec.k]})

    def enough(made: Any) -> Any:
        return results.stop(made, root=root, stages=stages, schedule=Schedule(iterations=iterations, stop_when=rule))

    root.mkdir(exist_ok=True)
    shared: Any = {"root": root, "outputs": root.parent, "clock": lambda: 0.0, "run": stub}
    runner.run_all(stages, listener=Quiet(), sink=Quiet(), enough=enough, **shared)
    return seen


@pytest.mark.parametrize(
    ("curve", "worse", "last"),
    [
        ([-5, -6, -7, -1, -1, -1, -1], 2, 2),  # a log-prob: lower is worse; the base counts
        ([-5, -6, -5, -6, -7, -1, -1], 2, 4),
        ([-5, -6, -5, -6, -5, -6, -5], 2, 6),
        ([-5, -5, -6, -6, -7, -7, -8], 1, 2),  # as good is not worse
        ([-1, -2, -3, -4, -5, -6, -7], 7, 6),
        ([-1, -2, -3, -4, -5, -6, -7], 6, 6),  # at the end anyway
    ],
)
def test_where_a_curve_ends(curve: list[float], worse: int, last: int, tmp_path: Path) -> None:
    assert played(tmp_path / "run", curve, 6, StopWhen("eval/heldout_real_logprob", worse)) == list(range(last + 1))


def test_only_the_newest_iterate_can_end_a_game(tmp_path: Path) -> None:
    """What was played without the rule, or before more iterations were asked for, stays and is built upon."""
    root, rule = tmp_path / "run", StopWhen("eval/heldout_real_logprob", 2)
    assert played(root, [-1, -2, -3, -2, 0, 0, 0], 2, rule) == [0, 1, 2]  # worse twice, at its end
    assert played(root, [-1, -2, -3, -2, 0, 0, 0], 3, rule) == []  # so no third
    assert played(root, [-1, -2, -3, -2, 0, 0, 0], 3, None) == [3]
    assert played(root, [-1, -2, -3, -2, -3, -4, 0], 6, rule) == [4, 5]
    assert rundir.readable(root / "iterate-05/model") and not (root / "iterate-06").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["schedule.stop_when={metric:eval/margin,worse:2}"], "give one of eval/heldout_nll, "),
        (["schedule.stop_when={worse:2}"], "give null, or both as in {metric: eval/heldout_nll, worse: 2}"),
        (["schedule.stop_when=2"], "give null, or both as in"),
        (["schedule.stop_when={metric:eval/heldout_nll,worse:0}"], "schedule.stop_when.worse=0"),
        (["schedule.stop_when={metric:eval/heldout_nll,wurse:2}"], "give null, or both as in"),
        ([RULE, "evaluation=none"], "nothing is evaluated"),
        (["schedule.stop_when={metric:eval/kl_off,worse:1}", "dataset=jsonl", "dataset.path=x"], "dataset=toy alone"),
    ],
)
def test_a_rule_that_cannot_be_followed_is_refused(words: list[str], told: str, command: Command) -> None:
    result = command("plan", *words)
    assert result.code == ConfigError.exit_code and told in result.err, result.err
