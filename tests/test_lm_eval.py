"""Benchmarks through the real lm-eval: our numbers are those of its own command on the same folder (slow)."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, Command, read_jsonl
from test_real import DATA, MISSING, model  # noqa: F401

lm_eval: Any = pytest.importorskip("lm_eval", reason="the extra eval is not installed")

TASK = """\
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {data}}}}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 2.5}}
"""
WRITTEN = """\
task: written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A folder with two tasks over forty sums."""
    folder = tmp_path / "mine"
    folder.mkdir()
    rows = [
        {"question": f"{a} + {b} =", "choices": [str(a + b + i) for i in (-1, 0, 1, 10)], "answer": 1}
        for a in range(2, 10)
        for b in (3, 5, 7, 11, 13)
    ]
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sums.yaml").write_text(TASK.format(data=data))
    (folder / "written.yaml").write_text(WRITTEN.format(data=data))
    return folder


def command_itself(out: Path, model_args: str, mine: Path, task: str, *more: str) -> dict[str, float]:
    """The numbers of `lm_eval` as one would type it."""
    words = ["--model", "hf", "--model_args", model_args, "--tasks", task, "--include_path", str(mine)]
    words += ["--output_path", str(out), "--device", "cpu", *more]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-m", "lm_eval", *words], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = out.rglob("*.json")
    return {k: v for k, v in json.loads(path.read_text())["results"][task].items() if "," in k}


def ours(root: Path, k: int, name: str) -> dict[str, float]:
    found = json.loads((root / f"iterate-{k:02d}/benchmarks/{name}/results.json").read_text())
    values = {f"{r['metric']},{r['filter']}": r["value"] for r in found["results"]}
    return values | {f"{r['metric']}_stderr,{r['filter']}": r["se"] for r in found["results"]}


@pytest.mark.slow
def test_numbers_are_those_of_the_command_itself(train: Callable[..., Path], mine: Path, tmp_path: Path) -> None:
    """With worked examples and the chat template, of the first items; without them an adapter is asked below."""
    root = train(
        *("schedule.iterations=1", f"evaluation.include_path={mine}", "evaluation.apply_chat_template=true"),
        *("evaluation.benchmarks=[{task: sums, num_fewshot: 3}, {task: written}]", "evaluation.limit=10"),
    )
    args, more = f"pretrained={root / 'iterate-01/model'}", ("--apply_chat_template", "--limit", "10")
    expected = command_itself(tmp_path / "a", args, mine, "sums", "--num_fewshot", "3", *more)
    assert ours(root, 1, "sums-3shot-chat-first10") == pytest.approx(expected) and expected["acc_stderr,none"] > 0
    expected = command_itself(tmp_path / "b", args, mine, "written", *more)
    assert ours(root, 1, "written-chat-first10") == pytest.approx(expected)
    rows = [row for row in read_jsonl(root / "metrics.jsonl") if "task" in row]
    assert [(r["iterate"], r["task"], r["items"]) for r in rows] == [
        (k, task, 10) for k in (0, 1) for task in ("sums", "written")
    ]
    assert rows[0]["task_version"] == 2.5 and rows[0]["lm_eval"] == lm_eval.__version__


@pytest.mark.slow
def test_an_adapter_is_judged_as_its_export_is(command: Command, mine: Path, tmp_path: Path) -> None:
    from spin_reg import models
    from spin_reg.settings import Tiny

    base = tmp_path / "base"
    start = models.start(Tiny(hidden_size=64, num_layers=2))
    start.model.save_pretrained(base)
    start.tokenizer.save_pretrained(base)
    own = [word for word in SMALL if not word.startswith("model.")]
    words = [*own, "model=pretrained", f"model.name_or_path={base}", "model.lora.rank=4", "schedule.learning_rate=0.1",
             "schedule.iterations=1", "run_name=run", f"outputs={tmp_path / 'o'}",
             "evaluation.benchmarks=[{task: sums}]", f"evaluation.include_path={mine}"]  # fmt: skip
    result = command("train", *words)
    assert result.code == 0, result.err
    root, merged = tmp_path / "o/run", tmp_path / "merged"
    assert ours(root, 0, "sums") == pytest.approx(command_itself(tmp_path / "a", f"pretrained={base}", mine, "sums"))
    assert command("export", str(root), "--to", str(merged)).code == 0
    assert ours(root, 1, "sums") == pytest.approx(command_itself(tmp_path / "b", f"pretrained={merged}", mine, "sums"))


@pytest.mark.slow
def test_a_task_that_lm_eval_cannot_use_is_told_with_its_words(
    train: Callable[..., Path], command: Command, mine: Path
) -> None:
    root = train("schedule.iterations=1")
    text = (mine / "sums.yaml").read_text()
    (mine / "sums.yaml").write_text(
        text.replace("answer\n", "no_such_field\n").replace("test_split: test", "test_split: x")
    )
    words = ["evaluation.benchmarks=[{task: sums}]", f"evaluation.include_path={mine}"]
    result = command("evaluate", str(root), *words)
    assert result.code == 1 and "lm-eval failed" in result.err and "exit code 1" in result.err
    (mine / "sums.yaml").write_text(text)
    assert command("evaluate", str(root), *words).code == 0


@pytest.mark.slow
def test_names_are_found_where_lm_eval_finds_them() -> None:
    from lm_eval.tasks import TaskManager

    from spin_reg import harness

    shelf = harness._Shelf(Path(lm_eval.__file__).parent / "tasks", "lm_eval")
    known = TaskManager().task_index
    named = list(known.items())
    for name, entry in [
        *named[::150],
        *((n, e) for n, e in named if n.startswith("leaderboard") or n in ("mmlu", "bbh")),
    ]:
        found = shelf.find(name)
        if entry.yaml_path is not None:
            assert [e.path for e in found] == [Path(entry.yaml_path)], name
        else:  # a tag
            assert {e.name for e in found} == entry.tags, name


@pytest.mark.real
@pytest.mark.skipif(MISSING, reason="no real model and data beside this checkout")
@pytest.mark.timeout(1500)
def test_a_real_model_is_judged_as_the_command_itself_does(
    model: Path,  # noqa: F811
    command: Command,
    mine: Path,
    tmp_path: Path,
) -> None:
    words = [
        *("tracker=none", "model=pretrained", f"model.name_or_path={model}", "dataset=jsonl", f"dataset.path={DATA}"),
        *("dataset.num_prompts=2", "dataset.num_heldout=2", "dataset.max_response_tokens=128", "dataset.max_dropped=1"),
        *(
            "generation.max_new_tokens=16",
            "schedule.iterations=1",
            "schedule.batch_size=2",
            "schedule.learning_rate=1e-5",
        ),
        *(f"outputs={tmp_path}", "run_name=run"),
    ]
    assert command("train", *words).code == 0
    root = tmp_path / "run"
    asked = ["evaluation.benchmarks=[{task: sums, num_fewshot: 2}]", f"evaluation.include_path={mine}"]
    result = command("evaluate", str(root), *asked)
    assert result.code == 0, result.err
    for k, folder in ((0, model), (1, root / "iterate-01/model")):
        expected = command_itself(tmp_path / f"{k}", f"pretrained={folder}", mine, "sums", "--num_fewshot", "2")
        assert ours(root, k, "sums-2shot") == pytest.approx(expected)
