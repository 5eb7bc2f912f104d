"""MT-Bench with a judge: verdicts and what they add up to, calls over real HTTP, and stages through the command."""

import json
import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from conftest import ROOT, SMALL, Command, read_jsonl
from fakejudge import Judge as Served
from fakejudge import serving
from test_identity import JUDGE, loaded

from spin_reg import asking, judging, questions, stopping
from spin_reg.benchmarks import Evaluation
from spin_reg.errors import ConfigError, DataError, SpinRegError, Stopped
from spin_reg.judging import Call, Score, Verdict
from spin_reg.mt_bench import Judge, Mode, MtBench, Prompt, Question
from spin_reg.replies import Cache

KEY = "sk-of-nobody-0123456789"
DATA = ROOT.parent / "shared/data/mt_bench"
ASKED = [
    {"question_id": 1, "category": "writing", "turns": ["abc", "d"]},
    {"question_id": 2, "category": "math", "turns": ["1+1", "2+2"], "reference": ["2", "4"]},
    {"question_id": 3, "category": "stem", "turns": ["e", "f"], "reference": None},
]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(asking, "FIRST_WAIT", 0.01)
    asking.begin()
    with serving(Served()) as judge:
        yield judge


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ASKED))
    return path


def judge_at(served: Served, **more: Any) -> Judge:
    return Judge(**{"base_url": served.base_url, "model": "m", "timeout": 5.0, **more})


def some_calls(judge: Judge, count: int) -> list[Call]:
    asked = [Question(str(i), "math", (f"question {i}",), (None,)) for i in range(count)]
    answers = {question.question_id: ["an answer"] for question in asked}
    return judging.calls(judge, Prompt("", "{{ turn.question }}: {{ turn.answer }}"), asked, answers)


def ask(judge: Judge, calls: list[Call], folder: Path, poll: Callable[[], None] = lambda: None) -> dict[str, str]:
    found = asking.ask(judge, calls, Cache(folder), poll=poll, progress=lambda done, total: None)
    return {key: reply.text for key, reply in found.items()}


@pytest.mark.parametrize(
    ("mode", "text", "expected"),
    [
        (Mode.single, "Good. Grade: [[7]]", 7.0),
        (Mode.single, "[[ 7.5 ]]", 7.5),
        (Mode.single, "[[7]] as I said, [[7]]", 7.0),
        (Mode.single, "<think>[[2]] or [[3]]</think> [[9]]", 9.0),
        (Mode.single, "[[10]]", 10.0),
        (Mode.single, "[[7]] or [[8]]", "several verdicts"),
        (Mode.single, "[[0]]", "out of range"),
        (Mode.single, "[[11]]", "out of range"),
        (Mode.single, "7/10, [7], [[-7]], [[A]]", "no verdict"),
        (Mode.single, "", "no verdict"),
        (Mode.single, "<think>[[7]]</think>", "no verdict"),
        (Mode.pairwise, "[[A]]", 1.0),
        (Mode.pairwise, "[[B]]", 0.0),
        (Mode.pairwise, "It is a tie: [[C]]", 0.5),
        (Mode.pairwise, "[[A]] [[B]]", "several verdicts"),
        (Mode.pairwise, "A [[7]] [[D]] [[a]]", "no verdict"),
    ],
)
def test_a_verdict_is_read_or_it_is_none(mode: Mode, text: str, expected: float | str) -> None:
    found = judging.verdict(mode, text)
    assert found == (Verdict(expected) if isinstance(expected, float) else Verdict(None, expected))


def test_a_win_is_one_in_both_places() -> None:
    """All nine pairs of verdicts, and those where one could not be read: A and B swap their names in the second."""
    expected = {"AB": 1.0, "BA": 0.0, "CC": 0.5, "AA": 0.5, "BB": 0.5, "AC": 0.5, "CB": 0.5, "CA": 0.5, "BC": 0.5}
    expected |= dict.fromkeys(["A-", "-B", "--"])
    for letters, value in expected.items():
        calls = [Call("q", "math", 1, 1, flipped, {}) for flipped in (False, True)]
        verdicts = [judging.verdict(Mode.pairwise, f"[[{letter}]]") for letter in letters]
        (score,) = judging.scores(Mode.pairwise, calls, verdicts)
        assert (score.value, score.agree) == (value, letters in {"AB", "BA", "CC"} or value is None), letters
        counts = judging.counts(Mode.pairwise, [score], verdicts)
        assert counts["inconsistent"] == (letters in {"AA", "BB", "AC", "CB", "CA", "BC"})
        assert counts["wins"] + counts["ties"] + counts["losses"] == counts["judged"] == (value is not None)
        assert counts["unparsable"] == letters.count("-") and counts["verdicts"] == 2


def test_means_are_over_questions_and_errors_too() -> None:
    rng = random.Random(0)
    made = [
        Score(str(q), "math" if q < 4 else "stem", turn, repeat, rng.choice([None, 1.0, 4.0, 7.5, 10.0]))
        for q in range(9)
        for turn in (1, 2)
        for repeat in (1, 2, 3)
    ]
    values = judging.summary(Mode.single, made)

    def brute(keep: Callable[[Score], bool]) -> tuple[float, float]:
        rows = [
            [s.value for s in made if s.question_id == str(q) and keep(s) and s.value is not None] for q in range(9)
        ]
        means = [sum(row) / len(row) for row in rows if row]
        center = sum(means) / len(means)
        variance = sum((m - center) ** 2 for m in means) / (len(means) - 1)
        return center, math.sqrt(variance / len(means))

    for name, keep in {
        "score": lambda s: True,
        "score_turn_2": lambda s: s.turn == 2,
        "score/stem": lambda s: s.category == "stem",
    }.items():
        found = values[f"eval/mt_bench/{name}"], values[f"eval/mt_bench/{name}_se"]
        assert found == pytest.approx(brute(keep), rel=1e-12)
    by_repeat = [brute(lambda s, r=r: s.repeat == r)[0] for r in (1, 2, 3)]
    assert values["eval/mt_bench/score_repeat_sd"] == pytest.approx(stdev(by_repeat), rel=1e-12)
    assert "eval/mt_bench/score_repeat_sd" not in judging.summary(Mode.single, [s for s in made if s.repeat == 1])
    whole = [Score(s.question_id, s.category, s.turn, 1, 5.0 + s.turn) for s in made if s.repeat == 1]
    values = judging.summary(Mode.single, whole)
    assert values["eval/mt_bench/score"] == mean([values[f"eval/mt_bench/score_turn_{t}"] for t in (1, 2)]) == 6.5
    nothing = [Score("1", "math", 1, 1, None)]
    assert judging.summary(Mode.single, nothing) == {}
    assert judging.counts(Mode.single, nothing, [Verdict(None, "no verdict")])["judged"] == 0


@pytest.mark.parametrize(
    ("judge", "bench", "says"),
    [
        ({"model": "m"}, {}, "evaluation.judge.model: without evaluation.mt_bench.questions it does nothing"),
        ({}, {"limit": 3}, "evaluation.mt_bench.limit: without"),
        ({"base_url": "http://h/v1"}, {"questions": "q"}, "evaluation.judge.model: MT-Bench is judged by a model"),
        ({"model": "m"}, {"questions": "q"}, "evaluation.judge.base_url: MT-Bench is judged by a model"),
        ({"base_url": "h/v1"}, {}, "give an address as https://HOST/v1"),
        ({"base_url": "http://h:x/v1"}, {}, "give an address"),
        ({"key_variable": "sk-of-nobody"}, {}, "key_variable: give the name of an environment variable with one of"),
        ({"key_variable": "JUDGE"}, {}, "masked everywhere"),
        ({"max_cost": 1.0}, {}, "what a call may cost is not known"),
        ({"max_cost": 1.0, "price_in": 1.0, "price_out": 1.0, "max_tokens": None}, {}, "what a call may cost"),
        ({"body": {"messages": []}}, {}, "evaluation.judge.body: give names and values"),
        ({"modes": []}, {}, "evaluation.judge.modes=[]"),
        ({"repeats": 0}, {}, "evaluation.judge.repeats=0"),
        ({"timeout": 0.0}, {}, "evaluation.judge.timeout=0.0"),
        ({"retries": -1}, {}, "evaluation.judge.retries=-1"),
        ({}, {"questions": "q", "temperatures": {"math": -1.0}}, "math has -1.0: give 0 (greedy)"),
    ],
)
def test_settings_without_effect_or_out_of_range_are_refused(
    judge: dict[str, Any], bench: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match="evaluation") as error:
        Evaluation(judge=Judge(**judge), mt_bench=MtBench(**bench))
    assert says in str(error.value) and "sk-of" not in str(error.value)


@pytest.mark.parametrize(
    "fault", ["500", "503", "429", "wait 0.05", "slow", "cut", "drop", "raw <html>", "raw {}", 'raw {"choices": [{}]}']
)
def test_what_may_pass_is_tried_again(served: Served, tmp_path: Path, fault: str) -> None:
    judge = judge_at(served, timeout=0.15 if fault == "slow" else 5.0, concurrency=1)
    served.faults = [fault]
    calls = some_calls(judge, 2)
    assert set(ask(judge, calls, tmp_path).values()) == {"Fine. Grade: [[7]]"}
    assert len(served.seen) == 3
    request, headers = served.seen[0]
    assert headers["Authorization"] == f"Bearer {KEY}" and request["path"] == "/v1/chat/completions"
    assert {key: request[key] for key in ("model", "temperature", "max_tokens")} == {
        **{"model": "m", "temperature": 0.0, "max_tokens": 2048}
    }
    assert request["messages"] == [{"role": "user", "content": "question 0: an answer"}]


def test_a_servers_wish_to_wait_is_heard(served: Served, tmp_path: Path) -> None:
    judge, began = judge_at(served), time.monotonic()
    served.faults = ["wait 0.4"]
    ask(judge, some_calls(judge, 1), tmp_path)
    assert 0.4 <= time.monotonic() - began < 3
    for value, wait in {"": None, "3": 3.0, "-3": 0.0, "nan": None, "soon": None}.items():
        assert asking._asked_wait({"retry-after": value}) == wait
    assert asking._asked_wait({"retry-after": "Fri, 31 Dec 1999 23:59:59 GMT"}) == 0.0
    served.faults = ["wait 3600"]
    with pytest.raises(SpinRegError, match="does not answer") as error:
        ask(judge, some_calls(judge, 2)[1:], tmp_path)
    assert "1 tries; the last: status 429: later" in error.value.why


def test_given_up_what_was_answered_is_kept_and_goes_on(served: Served, tmp_path: Path) -> None:
    judge = judge_at(served, retries=2, concurrency=1)
    calls = some_calls(judge, 4)
    served.say = lambda request: served.faults.extend(["500"] * 3 if len(served.seen) == 2 else []) or "[[7]]"
    with pytest.raises(SpinRegError, match="does not answer") as error:
        ask(judge, calls, tmp_path)
    assert error.value.exit_code == 1 and "3 tries; the last: status 500" in error.value.why
    assert KEY not in str(error.value) and "***" in error.value.why and str(error.value).count("\n") == 3
    assert len(served.seen) == 5 and not served.faults
    assert len(ask(judge, calls, tmp_path)) == 4
    assert len(served.seen) == 7  # the two that were missing
    assert not any(KEY in path.read_text() for path in tmp_path.rglob("*.json"))


def test_a_refusal_is_told_at_once(served: Served, tmp_path: Path) -> None:
    judge = judge_at(served)
    served.faults = ["401"]
    with pytest.raises(SpinRegError, match="The judge refuses") as error:
        ask(judge, some_calls(judge, 1), tmp_path)
    assert 'status 401: {"error": "no, because of Bearer ***"}' in error.value.why and len(served.seen) == 1


def test_calls_are_made_at_once_but_no_more_than_allowed(served: Served, tmp_path: Path) -> None:
    judge = judge_at(served, concurrency=3)
    served.delay = 0.03
    ask(judge, some_calls(judge, 9), tmp_path)
    assert served.busiest == 3


def test_a_call_is_made_once(served: Served, tmp_path: Path) -> None:
    """Equal requests are one call, a repeat is its own, and a file that is damaged is no answer."""
    judge = judge_at(served, repeats=2, key_variable=None)
    calls = some_calls(judge, 3)
    assert len({call.key for call in calls}) == 6
    ask(judge, [*calls, *calls], tmp_path)
    assert len(served.seen) == 6 and "Authorization" not in served.seen[0][1]
    ask(judge_at(served, repeats=3, concurrency=1, timeout=9.0), some_calls(judge_at(served, repeats=3), 3), tmp_path)
    assert len(served.seen) == 9
    (path,) = tmp_path.rglob(f"{calls[0].key}-*.json")
    path.write_text(path.read_text().replace("Grade: [[7]]", "Grade: [[9]]"))
    assert set(ask(judge, calls, tmp_path).values()) == {"Fine. Grade: [[7]]"}
    assert len(served.seen) == 10
    for more in ({"model": "n"}, {"temperature": 0.5}, {"max_tokens": 9}, {"body": {"seed": 1}}):
        assert {c.key for c in some_calls(judge_at(served, **more), 3)}.isdisjoint({c.key for c in calls})


def test_a_request_is_what_the_settings_say() -> None:
    judge = Judge(model="m", temperature=None, max_tokens=9, body={"max_completion_tokens": 7, "max_tokens": None})
    assert judging.request(judge, []) == {"model": "m", "messages": [], "max_completion_tokens": 7}
    assert judge.longest == 7 and Judge(max_tokens=None).longest is None


def test_a_limit_is_kept_before_the_first_call(served: Served, tmp_path: Path) -> None:
    judge = judge_at(served, max_calls=3, price_in=1e6, price_out=1e6, max_tokens=10)
    calls = some_calls(judge, 4)
    with pytest.raises(ConfigError, match="cost more than is allowed") as error:
        ask(judge, calls, tmp_path)
    assert "max_calls=3" in error.value.where and not served.seen
    ask(judge, calls[:3], tmp_path)
    asking.begin()
    ask(judge, calls, tmp_path)  # those in the cache are free
    assert len(served.seen) == 4
    cost = judging.cost(judge, calls, lambda key: False)
    assert (cost.calls, cost.read, cost.written) == (4, 4 * math.ceil(len("question 0: an answer") / 3), 40)
    assert cost.money(judge) == 4 * 7 + 40
    asking.begin()
    dear = judge_at(served, max_cost=67.9, price_in=1e6, price_out=1e6, max_tokens=10)
    with pytest.raises(ConfigError, match="cost more") as error:
        ask(dear, calls, tmp_path / "other")
    assert "up to 68" in error.value.why and len(served.seen) == 4


def test_a_limit_that_the_judge_outruns_stops_it_midway(served: Served, tmp_path: Path) -> None:
    """It counts 110 tokens a call where at most 17 were expected."""
    judge = judge_at(served, max_cost=300.0, price_in=1e6, price_out=1e6, max_tokens=10, concurrency=1)
    calls = some_calls(judge, 6)
    with pytest.raises(SpinRegError, match="reached what it may cost") as error:
        ask(judge, calls, tmp_path)
    assert error.value.exit_code == 1 and "3 calls were answered and cost 330; 3 are left" in error.value.why
    assert len(served.seen) == 3
    asking.begin()
    assert len(ask(judge, calls, tmp_path)) == 6 and len(served.seen) == 6


def test_a_signal_ends_the_calls_at_once(served: Served, tmp_path: Path) -> None:
    judge = judge_at(served, timeout=60.0)
    served.faults = ["wait 500"] * 2 + ["slow"] * 6
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with stopping.listening(), pytest.raises(Stopped):
        ask(judge, some_calls(judge, 20), tmp_path, stopping.poll)
    assert time.monotonic() - began < 1.5


def test_questions_are_read_in_the_layouts_of_the_field(tmp_path: Path) -> None:
    own = tmp_path / "q.jsonl"
    rows = [
        {"question_id": 7, "category": "math", "turns": ["a", "b"], "reference": ["x", ""]},
        {"prompt_id": 8, "category": "stem", "prompt": ["c"], "reference": []},
    ]
    own.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = Question("7", "math", ("a", "b"), ("x", None))
    assert questions.read(MtBench(questions=str(own))) == (first, Question("8", "stem", ("c",), (None,)))
    model_answers = tmp_path / "r.jsonl"
    model_answers.write_text(json.dumps({"question_id": 7, "choices": [{"turns": ["y", "z"]}]}) + "\n")
    found = questions.read(MtBench(questions=str(own), references=str(model_answers)))
    assert [q.references for q in found] == [("y", "z"), (None,)]
    for row, says in [
        ({"category": "math"}, "turns is not a list of texts"),
        ({"category": "math", "turns": ["a", " "]}, "turns is not a list"),
        ({"turns": ["a"]}, "no category"),
        ({"category": "a/b", "turns": ["a"]}, "no category"),
        ({"category": "m", "turns": ["a"], "reference": ["x", "y"]}, "2 references for 1 turns"),
        ({"question_id": 7, "category": "math", "turns": ["a"]}, "stands there twice"),
    ]:
        own.write_text("".join(json.dumps(r) + "\n" for r in [rows[0], row]))
        with pytest.raises(DataError, match="cannot be used") as error:
            questions.read(MtBench(questions=str(own)))
        assert says in error.value.why and error.value.where.endswith("row 2")
    with pytest.raises(DataError, match="not found"):
        questions.read(MtBench(questions=str(tmp_path / "none.jsonl")))


@pytest.mark.skipif(not DATA.exists(), reason="MT-Bench's files do not lie beside this checkout")
def test_the_real_questions() -> None:
    path = str(DATA / "question.jsonl")
    own = questions.asked(MtBench(questions=path), None)
    shown = questions.asked(MtBench(questions=path, references=str(DATA / "reference_answer-gpt-4.jsonl")), None)
    assert len(own.questions) == 80 and all(len(q.turns) == 2 for q in own.questions)
    having = {q.category for q in shown.questions if q.references[0]}
    assert having == {"math", "reasoning", "coding"} and sum(q.references[1] is not None for q in shown.questions) == 30
    assert own.turns_sha256 == shown.turns_sha256 and own.references_sha256 != shown.references_sha256


def test_prompts_of_ones_own_must_show_what_is_judged(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    shown = "{% for t in turns %}{{ t.question }}{{ t.answer }}{{ t.reference }}{% endfor %}"
    good = f"single: {{system: '', user: '{shown}[[7]]'}}\n"
    pair = "pairwise: {system: s, user: '{% for t in turns %}{{ t }}{% endfor %} [[A]]'}\n"
    path.write_text(good + pair)
    assert questions.prompts_of(str(path))[Mode.pairwise].system == "s"
    for text, says in [
        (good, "not exactly `single` and `pairwise`"),
        (good.replace("{{ t.answer }}", "") + pair, "it leaves out answer 2"),
        (good.replace("{{ t.reference }}", "") + pair, "it leaves out reference 2"),
        (good.replace("[[7]]", "") + pair, "double brackets"),
        (good.replace("t.answer", "t.anwser") + pair, "UndefinedError"),
        (good.replace("{{ t.answer }}", "{{ t.__class__.__mro__ }}") + pair, "SecurityError"),
        (good.replace("system: ''", "system: 1") + pair, "both texts"),
        ("a: [", "parsing"),
    ]:
        path.write_text(text)
        with pytest.raises(ConfigError, match="prompts cannot be used") as error:
            questions.prompts_of(str(path))
        assert says in error.value.why, text


def test_the_judge_sees_both_orders_and_the_references() -> None:
    asked = [Question("q", "math", ("Q1", "Q2"), ("R1", "R2"))]
    own, other = {"q": ["own 1", "own 2"]}, {"q": ["other 1", "other 2"]}
    prompts = questions.prompts_of(None)
    single = [c.body["messages"][1]["content"] for c in judging.calls(Judge(), prompts[Mode.single], asked, own)]
    assert len(single) == 2 and "Q2" not in single[0] and "R2" not in single[0]
    places = [single[1].index(text) for text in ("Q1", "own 1", "Q2", "R2", "own 2")]
    assert places == sorted(places) and "Grade: [[" in single[1]
    pairs = judging.calls(Judge(), prompts[Mode.pairwise], asked, own, other)
    for call in pairs:
        text = call.body["messages"][1]["content"]
        first, second = text.index("own 1"), text.index("other 1")
        assert (first > second) == call.flipped and ("own 2" in text) == ("R2" in text) == (call.turn == 2)
    assert [(call.turn, call.flipped) for call in pairs] == [(1, False), (1, True), (2, False), (2, True)]


def asking_for(file: Path, served: Served, *more: str) -> list[str]:
    words = ["evaluation=mt_bench", f"evaluation.mt_bench.questions={file}", "evaluation.judge.model=org/m:1"]
    return [*words, f"evaluation.judge.base_url={served.base_url}", "evaluation.mt_bench.max_new_tokens=6", *more]


def liking_the_first(request: dict[str, Any]) -> str:
    """Grades by how long the request is, so that they differ; of two it likes the one in the first place."""
    text = request["messages"][-1]["content"]
    return "[[A]]" if "ASSISTANT B" in text else f"[[{len(text) % 9 + 1}]]"


@pytest.mark.slow
def test_a_finished_run_is_judged_and_only_what_is_missing_is_asked(
    train: Callable[..., Path], command: Command, served: Served, file: Path
) -> None:
    root, cache = train("schedule.iterations=1"), file.parent / "outputs/.judge"
    made = {path: path.stat().st_mtime_ns for path in root.rglob("stage.json")}
    rows = read_jsonl(root / "metrics.jsonl")
    served.say = liking_the_first
    refused = command("evaluate", str(root), *asking_for(file, served, "evaluation.judge.max_calls=23"))
    assert refused.code == 2 and "needs 24 calls" in refused.err and not served.seen and refused.err.count("\n") == 4
    result = command("evaluate", str(root), *asking_for(file, served))
    assert result.code == 0, result.err
    assert len(served.seen) == len(list(cache.rglob("*.json"))) == 3 * 2 * (2 + 2)  # two grades; a pair in two orders
    assert "MT-Bench, judged by org/m:1" in result.err and "answers judged, pairwise" in result.err
    after = read_jsonl(root / "metrics.jsonl")
    assert after[: len(rows)] == rows and all(path.stat().st_mtime_ns == made[path] for path in made)
    judged = {(row["iterate"], row.get("mode")): row for row in after[len(rows) :]}
    assert set(judged) == {(0, None), (0, "single"), (1, None), (1, "single"), (1, "pairwise")}
    pair = judged[1, "pairwise"]
    assert pair["eval/mt_bench/win_rate"] == 0.5 and (pair["ties"], pair["inconsistent"], pair["wins"]) == (6, 6, 0)
    assert pair["judge"] == "org/m:1" and pair["step"] == rows[-1]["step"] and pair["unparsable"] == 0
    grades = [row["value"] for row in read_jsonl(root / "iterate-01/mt_bench/single-org-m-1/verdicts.jsonl")]
    assert judged[1, "single"]["eval/mt_bench/score"] == pytest.approx(sum(grades) / 6, rel=1e-12)
    found = json.loads((root / "iterate-01/mt_bench/single-org-m-1/results.json").read_text())
    assert found["judge"]["answered_as"] == ["judge-as-served"] and found["judge"]["hosts"][0].startswith("127.0.0.1:")
    assert found["time"]["first"][:4].isdigit() and found["judge"]["prompts_sha256"] and found["tokens"]["read"] == 600
    assert not any(KEY.encode() in path.read_bytes() for path in file.parent.rglob("*") if path.is_file())

    asked = len(served.seen)
    assert "nothing to do" in command("evaluate", str(root), "evaluation.judge.concurrency=2").err
    (root / "iterate-01/mt_bench/single-org-m-1/results.json").unlink()
    assert "single" in command("evaluate", str(root)).err and len(served.seen) == asked  # it came from the cache
    answers = (root / "iterate-01/mt_bench/answers/stage.json").stat().st_mtime_ns
    file.write_text(file.read_text().replace('["2", "4"]', '["2", "5"]'))
    assert command("evaluate", str(root)).code == 0
    assert len(served.seen) == asked + 4  # what shows the corrected reference: one question's second turn
    assert (root / "iterate-01/mt_bench/answers/stage.json").stat().st_mtime_ns == answers
    served.say = lambda request: "I cannot say."
    told = command("evaluate", str(root), "evaluation.judge.repeats=2", "evaluation.judge.modes=[single]")
    assert "6 of 12 verdicts could not be read (no verdict: 6), so 6 of 12 answers are scored" in told.err


def test_before_anything_is_made_the_judge_must_be_there(
    command: Command, served: Served, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = file.parent / "o"
    words = [*SMALL, "schedule.iterations=1", f"outputs={place}", *asking_for(file, served)]
    for code, change, says in [
        (2, lambda patch: patch.delenv("OPENAI_API_KEY"), "OPENAI_API_KEY is not set"),
        (2, lambda patch: patch.setenv("OPENAI_API_KEY", "two\nlines"), "is not a key"),
        (2, lambda patch: patch.setattr(asking, "find_spec", lambda name: None), "pip install spin-reg[judge]"),
        (2, lambda patch: words.append(f"evaluation.judge.body={{k: {KEY}}}"), "A setting holds a secret"),
        (2, lambda patch: words.__setitem__(-1, "evaluation.judge.model=null"), "evaluation.judge.model"),
        (3, lambda patch: words.__setitem__(-1, "evaluation.mt_bench.questions=no.jsonl"), "was not found"),
    ]:
        with monkeypatch.context() as patch:
            change(patch)
            result = command("train", *words)
        assert result.code == code and says in result.err and result.err.count("\n") == 4, result.err
        assert not place.exists() and not served.seen and KEY not in result.err
    result = command("plan", *words[:-1])
    assert "judge: 24 calls to org/m:1 at 127.0.0.1" in result.out and "in the cache): about" in result.out
    assert all(
        f"iterate-01/mt_bench/{name}" in result.out for name in ("answers", "single-org-m-1", "pairwise-org-m-1")
    )


def test_only_pairs_need_the_opponent_and_a_base_is_no_opponent_of_itself() -> None:
    from spin_reg.plan import plan
    from spin_reg.stage import Sources

    asked = questions.asked(MtBench(questions=str(DATA / "question.jsonl")), None) if DATA.exists() else None
    stages = {s.name: s for s in plan(loaded(tuple(JUDGE.split())), Sources("m", "t", "d", mt_bench=asked))}
    single, pair = stages["iterate-02/mt_bench/single-m"], stages["iterate-02/mt_bench/pairwise-m"]
    assert pair.needs["opponent"] is stages["iterate-00/mt_bench/answers"] and "opponent" not in single.needs
    assert "iterate-00/mt_bench/pairwise-m" not in stages
    other = {s.name: s for s in plan(loaded((*JUDGE.split(), "seed=1")), Sources("m", "t", "d", mt_bench=asked))}
    assert other["mt_bench/questions"].fingerprint == stages["mt_bench/questions"].fingerprint


def test_answers_are_the_models_own_turn_by_turn(train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a bare loop over the model: greedy at 0; and what others are asked changes no answer."""
    import torch

    from spin_reg import iterates, sampling
    from spin_reg.context import Context
    from spin_reg.policies import policy
    from spin_reg.settings import Hardware
    from spin_reg.specs import ConverseSpec
    from spin_reg.stages import converse

    root = train("schedule.iterations=1", "evaluation=none")
    how = policy(loaded(()))
    loaded_model = iterates.load(root / "iterate-01/model", how)
    spec = ConverseSpec(1, {"math": 0.0}, 0.7, 5, 3, how, Hardware())
    rows = [{**row, "question_id": str(row["question_id"])} for row in ASKED]
    points: list[list[float]] = []
    uniforms = sampling.uniforms
    monkeypatch.setattr(sampling, "uniforms", lambda *key: points.append((made := uniforms(*key)).tolist()) or made)
    said = converse.converse(spec, loaded_model, rows, Context())
    text = "<|user|>1+1<|end|><|assistant|>" + said[1][0][0] + "<|end|><|user|>2+2<|end|><|assistant|>"
    ids = loaded_model.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert converse.prompt(loaded_model, rows[1], [said[1][0][0]]) == ids
    assert len({tuple(numbers) for numbers in points}) == len(points) == 6  # each turn of each question has its own
    for _ in range(said[1][1][2]):
        with torch.no_grad():
            ids.append(int(loaded_model.model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert loaded_model.tokenizer.decode(ids[-said[1][1][2] :], skip_special_tokens=True) == said[1][1][0]
    alone = converse.converse(spec, loaded_model, rows[:1], Context())
    assert alone[0] == said[0] and alone[0][0] != alone[0][1]
    other = converse.converse(ConverseSpec(1, {"math": 0.0}, 0.7, 5, 4, how, Hardware()), loaded_model, rows, Context())
    assert other[1] == said[1] and other[0] != said[0]  # the seed moves what is drawn alone
    positions = loaded_model.model.config.max_position_embeddings
    assert converse.room(spec, loaded_model, "q", positions - 2) == 2
    with pytest.raises(DataError, match="cannot be asked"):
        converse.room(spec, loaded_model, "q", positions)
