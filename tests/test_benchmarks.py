"""Benchmarks: settings, plan, what a task is by content, and the stage over a stand-in for lm-eval's command.

The real one is in test_lm_eval.py.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, Command, read_jsonl
from test_identity import KNOWN, loaded, prints

from spin_reg import amounts, child, config, estimate, harness, iterates, pace, stopping
from spin_reg.benchmarks import Benchmark, Evaluation, TaskFiles
from spin_reg.context import Context
from spin_reg.errors import ConfigError, DataError, SpinRegError, Stopped
from spin_reg.plan import Sources, plan
from spin_reg.settings import Dtype
from spin_reg.specs import BenchmarkSpec, Split
from spin_reg.stages import benchmark

STAND_IN = """
import json, os, sys, time
words = sys.argv[1:]
given = {w.removeprefix("--"): v for w, v in zip(words, words[1:] + [""]) if w.startswith("--")}
task = given["tasks"]
print("Loading", flush=True)
if task == "broken":
    print("Traceback\\nValueError: no such field: {{x}}", flush=True)
    sys.exit(3)
if task == "slow":
    for _ in range(600):
        print("Running loglikelihood requests:  25%|##5       | 1/4 [00:00<00:01,  2.00it/s]", end="\\r", flush=True)
        time.sleep(0.1)
shots = int(given.get("num_fewshot", 2))
found = {"acc,none": 0.5, "acc_stderr,none": 0.25, "exact_match,strict": 0.75, "exact_match_stderr,strict": "N/A"}
results = {
    "results": {task: {"alias": task, "name": task, "sample_len": 4, **found}},
    "n-samples": {task: {"original": 4, "effective": 4}}, "n-shot": {task: shots}, "versions": {task: 1.5},
    "higher_is_better": {task: {"acc": True, "exact_match": True}}, "group_subtasks": {task: []},
    "words": words, "environment": dict(os.environ), "given": given,
}
with open(given["output_path"].replace(".json", "_2026.json"), "w") as stream:
    json.dump(results, stream)
"""


def place(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for lm-eval 0.4.13 with three tasks of its own; its folder of tasks."""
    site = place(
        tmp_path / "site",
        {
            "lm_eval/__init__.py": "",
            "lm_eval/__main__.py": STAND_IN,
            "lm_eval-0.4.13.dist-info/METADATA": "Metadata-Version: 2.1\nName: lm_eval\nVersion: 0.4.13\n",
            "lm_eval/tasks/arc/arc.yaml": "task: arc_challenge\ntag: ai2_arc\ndataset_path: allenai/ai2_arc\n",
            "lm_eval/tasks/arc/easy.yaml": "include: arc.yaml\ntask: arc_easy\n",
            "lm_eval/tasks/both.yaml": "group: both\ntask:\n  - ai2_arc\n",
        },
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)  # the real one, where another test has imported it, would be found first
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", str(site))
    return site / "lm_eval/tasks"


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A folder of tasks over a local file."""
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/items.jsonl}}}}\n"
    (tmp_path / "items.jsonl").write_text('{"q": "1"}\n')
    return place(
        tmp_path / "mine",
        {
            "base.template": f"{data}tag: [mine]\noutput_type: multiple_choice\n",
            "deep/t.yaml": "include: ../base.template\ntask: t\nprocess_docs: !function utils.docs\n",
            "deep/utils.py": "def docs(x): return x\n",
            "other.yaml": f"task: other\n{data}",
            "suite.yaml": "group: suite\ntask:\n  - t\n  - {task: other, num_fewshot: 1}\n",
            "slow.yaml": f"task: slow\n{data}",
            "broken.yaml": f"task: broken\n{data}",
            "not.yaml": "- nothing\n",
            "bad.yaml": "a: [",
        },
    )


def content(names: str, include_path: Path | None = None, **recorded: str) -> dict[str, TaskFiles]:
    listed = [Benchmark(task=name) for name in names.split()]
    return harness.tasks(Evaluation(benchmarks=listed, include_path=include_path and str(include_path)), recorded)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"benchmarks": [("../x", None)]}, "'../x' is no name of a task"),
        ({"benchmarks": [("mmlu*", None)]}, "'mmlu*' is no name of a task"),
        ({"benchmarks": [("x", -1)]}, "x has num_fewshot=-1: give 0 or more, or null"),
        ({"benchmarks": [("x", 1), ("x", 2)]}, "evaluation.benchmarks: x: give each task once"),
        ({"benchmarks": [("x", 1)], "enabled": False}, "leave one of them out"),
        ({"benchmarks": [("x", 1)], "limit": 0}, "evaluation.limit=0: give a whole number from 1"),
        ({"limit": 9}, "evaluation.limit=9: without benchmarks it does nothing"),
        ({"apply_chat_template": True}, "evaluation.apply_chat_template=True: without benchmarks"),
        ({"include_path": "x"}, "evaluation.include_path=x: without benchmarks"),
        ({"benchmark_batch_size": 2}, "evaluation.benchmark_batch_size=2: without benchmarks"),
    ],
)
def test_settings_without_effect_or_out_of_range_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match="evaluation") as error:
        listed = [Benchmark(task, shots) for task, shots in given.pop("benchmarks", [])]
        Evaluation(benchmarks=listed, **given)
    assert says in str(error.value)


def test_the_presets_are_those_of_the_two_boards() -> None:
    shots = {b.task: b.num_fewshot for b in loaded(("evaluation=openllm",)).evaluation.benchmarks}
    assert shots == {
        **{"arc_challenge": 25, "hellaswag": 10, "truthfulqa_mc2": 0, "mmlu": 5, "winogrande": 5, "gsm8k": 5}
    }
    second = loaded(("evaluation=leaderboard",)).evaluation.benchmarks
    assert len(second) == 6 and all(b.task.startswith("leaderboard_") and b.num_fewshot is None for b in second)


def test_every_iterate_has_one_stage_a_task_and_the_rest_of_the_run_stays_as_it_was() -> None:
    """Benchmarks come last; or, where weights go along the way, as soon as their iterate is there."""
    words = ["evaluation.benchmarks=[{task: a, num_fewshot: 5}, {task: b}]", "schedule.iterations=2"]
    settings = loaded((), *words)
    stages = plan(settings, KNOWN)
    names = [f"iterate-{k:02d}/benchmarks/{task}" for k in range(3) for task in ("a-5shot", "b")]
    assert [stage.name for stage in stages[-6:]] == names
    without = prints(loaded((), "schedule.iterations=2"))
    assert without.items() <= prints(settings).items()
    assert config.run_name(settings) == config.run_name(loaded(()))
    early = [s.name for s in plan(loaded((), *words, "keep_iterates=needed"), KNOWN)]
    assert early.index(names[0]) < early.index("iteration-00/train") < early.index(names[2])
    assert sorted(early) == sorted(stage.name for stage in stages)


@pytest.mark.parametrize(
    ("word", "folder"),
    [
        ("evaluation.limit=7", "b-first7"),
        ("evaluation.apply_chat_template=true", "b-chat"),
        ("evaluation.benchmarks=[{task: b, num_fewshot: 0}]", "b-0shot"),
    ],
)
def test_another_way_to_ask_lies_in_another_folder(word: str, folder: str) -> None:
    one, other = (prints(loaded((), "evaluation.benchmarks=[{task: b}]", *more)) for more in ((), (word,)))
    assert f"iterate-01/benchmarks/{folder}" in other and "iterate-01/benchmarks/b" in one
    assert other[f"iterate-01/benchmarks/{folder}"] != one["iterate-01/benchmarks/b"]


def test_a_tasks_content_is_part_of_its_stages_alone() -> None:
    settings = loaded((), "evaluation.benchmarks=[{task: a}, {task: b}]")
    one = prints(settings, Sources(**{**vars(KNOWN), "tasks": {"a": TaskFiles("1"), "b": TaskFiles("2")}}))
    other = prints(settings, Sources(**{**vars(KNOWN), "tasks": {"a": TaskFiles("1", True), "b": TaskFiles("3")}}))
    assert {name.rpartition("/")[2] for name in one if one[name] != other[name]} == {"b"}


def test_a_task_is_its_yaml_what_that_includes_the_python_beside_it_and_its_data(mine: Path) -> None:
    before = content("t other suite", mine)
    assert all(task.local and task.sha256 for task in before.values())
    for name, changed in [
        ("deep/t.yaml", {"t", "suite"}),
        ("base.template", {"t", "suite"}),
        ("deep/utils.py", {"t", "suite"}),
        ("suite.yaml", {"suite"}),
        ("slow.yaml", set()),
        ("../items.jsonl", {"t", "other", "suite"}),
    ]:
        path = mine / name
        text = path.read_text()
        path.write_text(f"{text}\n")
        after = content("t other suite", mine)
        assert {task for task in before if before[task] != after[task]} == changed, name
        path.write_text(text)
    assert content("t other suite", mine) == before
    (mine / "../items.jsonl").unlink()
    with pytest.raises(ConfigError, match="no data"):
        content("t", mine)


def test_files_of_one_name_and_python_beside_what_is_included_count_too(mine: Path) -> None:
    def again(path: str, text: str) -> str | None:
        place(mine, {path: text})
        return content("t", mine)["t"].sha256

    data = "dataset_path: json\ndataset_kwargs: {data_files: {test: %s/a/x.jsonl, train: %s/b/x.jsonl}}\n"
    before = again("base.template", data % (mine, mine)) if place(mine, {"a/x.jsonl": "1", "b/x.jsonl": "2"}) else None
    assert len({before, again("a/x.jsonl", "3"), again("b/x.jsonl", "4"), again("helpers.py", "5")}) == 4


@pytest.mark.usefixtures("installed")
def test_numbers_of_a_task_that_changed_meanwhile_are_refused(mine: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    asked = spec("t", files=content("t", mine)["t"].sha256, include_path=str(mine))
    benchmark.run(asked, {"model": tmp_path}, tmp_path / "out", Context())
    (mine / "deep/utils.py").write_text("def docs(x): return x[:1]\n")
    with pytest.raises(DataError, match="has changed"):
        benchmark.run(asked, {"model": tmp_path}, tmp_path / "out", Context())


def test_names_are_looked_up_in_ones_own_folder_first(mine: Path, installed: Path) -> None:
    theirs = content("arc_easy ai2_arc both arc_challenge")
    assert theirs["arc_easy"] == theirs["ai2_arc"] != theirs["both"]  # it includes the other file that bears the tag
    assert theirs["arc_challenge"] != theirs["arc_easy"] and not any(task.local for task in theirs.values())
    (mine / "arc.yaml").write_text("task: arc_easy\ndataset_path: x/y\n")
    assert content("arc_easy both", mine)["arc_easy"] != theirs["arc_easy"]
    assert content("arc_challenge t", mine)["arc_challenge"] == theirs["arc_challenge"]
    with pytest.raises(ConfigError, match="has none of the tasks"):
        content("arc_challenge", mine)
    with pytest.raises(ConfigError, match="There is no benchmark arc_chalenge") as error:
        content("arc_chalenge")
    assert "did you mean arc_challenge" in error.value.todo and "lm-eval 0.4.13 has no task" in error.value.why
    with pytest.raises(ConfigError, match="no folder of tasks"):
        content("t", mine / "nowhere")


@pytest.mark.usefixtures("missing")
def test_without_lm_eval_what_is_on_record_counts(mine: Path) -> None:
    assert content("arc_easy", arc_easy="1") == {"arc_easy": TaskFiles("1")}
    assert content("t", mine, t="1")["t"].sha256 != "1"
    with pytest.raises(ConfigError, match="lm-eval is not installed") as error:
        harness.check()
    assert "pip install spin-reg[eval]" in error.value.todo


def test_an_old_lm_eval_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("0.4.10", "0.5.0", "1.0"):
        monkeypatch.setattr(harness, "version", lambda version=version: version)
        harness.check()
    monkeypatch.setattr(harness, "version", lambda: "0.4.9.2")
    with pytest.raises(ConfigError, match="too old"):
        harness.check()


def spec(task: str, **more: Any) -> BenchmarkSpec:
    given: dict[str, Any] = {"num_fewshot": None, "apply_chat_template": False, "limit": None, "files": "1"}
    return BenchmarkSpec(**{**given, "k": 1, "task": task, "dtype": Dtype.float32, "attn_implementation": None, **more})


@pytest.mark.usefixtures("installed")
def test_the_stage_runs_the_command_and_keeps_its_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, out = tmp_path / "a, model=1", tmp_path / "out"
    for folder in (model, out):
        folder.mkdir()
    asked = spec(
        "t", num_fewshot=0, apply_chat_template=True, limit=3, local=True, include_path="here", batch_size=5, files=None
    )
    benchmark.run(asked, {"model": model}, out, Context())
    raw = json.loads(next(out.glob(".scratch/results/*.json")).read_text())
    said = json.loads(raw["given"].pop("model_args"))
    assert said == {"pretrained": str(model), "dtype": "float32", "trust_remote_code": False, "use_safetensors": True}
    expected = {"model": "hf", "tasks": "t", "batch_size": "5", "num_fewshot": "0", "limit": "3"}
    assert expected.items() <= raw["given"].items() and "--apply_chat_template" in raw["words"]
    assert raw["given"]["include_path"] == str(Path("here").absolute())
    assert raw["environment"]["HF_HUB_OFFLINE"] == raw["environment"]["HF_DATASETS_OFFLINE"] == "1"
    found = json.loads((out / "results.json").read_text())
    shared = {"task": "t", "higher_is_better": True, "task_version": 1.5, "num_fewshot": 0, "items": 4}
    assert found.pop("results") == [
        {"metric": "acc", "filter": "none", "value": 0.5, "se": 0.25, **shared},
        {"metric": "exact_match", "filter": "strict", "value": 0.75, "se": None, **shared},
    ]
    head = {"iterate": 1, "task": "t", "num_fewshot": 0, "apply_chat_template": True}
    assert found == {**head, "limit": 3, "lm_eval": "0.4.13"}
    (row,) = read_jsonl(out / "metrics.jsonl")
    assert row == {
        **{**head, "iteration": 0, "step": 0, "task_version": 1.5, "items": 4, "lm_eval": "0.4.13"},
        **{"eval/t/acc": 0.5, "eval/t/acc_se": 0.25, "eval/t/exact_match,strict": 0.75},
    }
    assert "HF_HUB_OFFLINE" not in benchmark.environment(spec("t")) or "HF_HUB_OFFLINE" in os.environ


def test_groups_add_their_tasks_up() -> None:
    found = {
        "results": {"g": {"acc,none": 0.4}, "a": {"acc,none": 0.25}, "b": {"acc,none": float("nan")}},
        "n-samples": {"a": {"effective": 4}, "b": {"effective": 6}},
        "n-shot": {"a": 3, "b": 5},
        "versions": {"a": 1, "b": 1, "g": 2},
        "group_subtasks": {"g": ["inner"], "inner": ["a", "b"]},
    }
    results = {result["task"]: result for result in benchmark.numbers(found)}
    assert (results["g"]["items"], results["g"]["num_fewshot"], results["b"]["value"]) == (10, "3, 5", None)
    row = benchmark.row(spec("g"), Path("none"), list(results.values()), found)
    assert row["eval/g/acc"] == 0.4 and row["items"] == 10 and "eval/a/acc" not in row
    del found["results"]["g"]  # a tag, or a group that gives no number itself
    row = benchmark.row(spec("g"), Path("none"), list(benchmark.numbers(found)), found)
    assert row["eval/a/acc"] == 0.25 and "eval/b/acc" not in row and (row["items"], row["task_version"]) == (10, 1)


@pytest.mark.usefixtures("installed")
def test_a_failure_is_told_with_the_last_words(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(SpinRegError, match="lm-eval failed") as error:
        benchmark.run(spec("broken"), {"model": tmp_path}, tmp_path / "out", Context())
    assert error.value.why == "exit code 3; it said last: Loading | Traceback | ValueError: no such field: {{x}}"
    assert error.value.exit_code == 1 and "no such field" in caplog.text
    assert not (tmp_path / "out/results.json").exists()


@pytest.mark.usefixtures("installed")
def test_a_signal_ends_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[int, int, str]] = []
    pids: list[int] = []
    opened = child.subprocess.Popen

    def popen(*args: Any, **kwargs: Any) -> Any:
        process = opened(*args, **kwargs)
        pids.append(process.pid)
        return process

    def progress(*said: Any) -> None:
        heard.append(said)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(child.subprocess, "Popen", popen)
    began = time.monotonic()
    with stopping.listening(), pytest.raises(Stopped):
        benchmark.run(spec("slow"), {"model": tmp_path}, tmp_path / "out", Context(progress, poll=stopping.poll))
    assert heard[0] == (1, 4, "request") and time.monotonic() - began < 3
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_a_child_goes_with_a_process_that_is_ended_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "_exit", lambda code: None)
    code, _ = child.run([sys.executable, "-c", "input()"], os.environ, poll=lambda: None, heard=print)
    assert code == 1  # it has no input to wait for
    threading.Timer(0.3, stopping._end).start()
    code, _ = child.run(["sleep", "60"], os.environ, poll=lambda: None, heard=print)
    assert code == -signal.SIGKILL


def test_adapters_and_bases_are_judged_where_they_lie(tmp_path: Path) -> None:
    base = place(tmp_path / "base", {"config.json": "{}", "model.safetensors": "x", "m.gguf": "x"})
    from spin_reg import sources
    from spin_reg.settings import Dtype, Pretrained
    from spin_reg.specs import Policy

    for name, more in (("base", {}), ("gguf", {"gguf_file": "m.gguf"})):
        model = Pretrained(name_or_path=str(base), **more)
        record = iterates.base_record(model, sources.model_sha256(model))
        folder = place(tmp_path / name / "iterate", {"base.json": json.dumps(record)})
        expected, read = {"pretrained": str(base), **more}, Policy(Dtype.float32, None, None)
        assert iterates.for_others(folder, read, tokenizer=None) == expected
        place(folder, {"adapter_config.json": "{}"})
        assert iterates.for_others(folder, read, tokenizer=None) == expected | {"peft": str(folder)}
    moved = base.rename(tmp_path / "elsewhere")
    assert iterates.for_others(folder, replace(read, base=str(moved)), tokenizer=None)["pretrained"] == str(moved)


@pytest.mark.slow
def test_benchmarks_are_added_to_a_finished_run(
    train: Callable[..., Path], command: Command, installed: Path, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = train("schedule.iterations=1")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("stage.json")}
    rows = read_jsonl(root / "metrics.jsonl")
    asked = ("evaluation.benchmarks=[{task: t}, {task: arc_easy, num_fewshot: 3}]", f"evaluation.include_path={mine}")
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody_at_all")
    result = command("evaluate", str(root), *asked)
    assert result.code == 0, result.err
    assert "t (version 1.5, 2-shot, n=4)" in result.err and "0.500 (0.250)" in result.err
    after = read_jsonl(root / "metrics.jsonl")
    assert after[: len(rows)] == rows
    judged = [(r["iterate"], r["task"], r["num_fewshot"], r["eval/" + r["task"] + "/acc"]) for r in after[len(rows) :]]
    assert judged == [(k, task, shots, 0.5) for k in (0, 1) for task, shots in (("t", 2), ("arc_easy", 3))]
    assert {key: after[-1][key] for key in ("iteration", "step")} == {"iteration": 0, "step": rows[-1]["step"]}
    assert all(path.stat().st_mtime_ns == before[path] for path in before)
    assert not any(b"hf_of_nobody" in path.read_bytes() for path in root.rglob("*") if path.is_file())
    assert "nothing to do" in command("evaluate", str(root)).err
    with monkeypatch.context() as patch:
        patch.setattr(harness, "find_spec", lambda name: None)
        assert "nothing to do" in command("resume", str(root)).err
        more = command("evaluate", str(root), "evaluation.limit=2")
        assert more.code == 2 and more.err.count("\n") == 4 and "lm-eval is not installed" in more.err
    (mine / "deep/t.yaml").write_text((mine / "deep/t.yaml").read_text() + "num_fewshot: 1\n")
    assert command("evaluate", str(root)).err.count("benchmarks/t") == 2  # made again, the other task is not


@pytest.mark.parametrize(("task", "says"), [("nothing", "There is no benchmark nothing"), ("t", "not installed")])
def test_before_anything_is_made_a_task_must_be_known(
    task: str, says: str, command: Command, installed: Path, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if task == "t":
        monkeypatch.setattr(harness, "find_spec", lambda name: None)
    words = [f"evaluation.benchmarks=[{{task: {task}}}]", f"evaluation.include_path={mine}"]
    result = command("train", *SMALL, *words, f"outputs={tmp_path / 'o'}")
    assert result.code == 2 and says in result.err and result.err.count("\n") == 4
    assert not (tmp_path / "o").exists()


def test_time_that_benchmarks_may_take_is_not_passed_over() -> None:
    stages = plan(loaded((), "evaluation.benchmarks=[{task: a}]"), KNOWN)
    pieces = estimate.pieces(stages, amounts.limits(loaded(()).dataset, dict.fromkeys(Split, 8)))
    asked = [stage.name for stage in stages if stage.kind == "benchmark"]
    assert pace.left(pieces, asked, "").unknown == ("benchmark",)
    log = "INFO runner: iterate-00/benchmarks/a: todo (not made yet)\n"
    log += 'INFO context: iterate-00/benchmarks/a: at {"done": 30, "total": 40, "since": 10, "seconds": 20}\n'
    assert pace.left(pieces, asked[:1], log).seconds == pytest.approx(10)
