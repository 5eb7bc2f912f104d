"""MT-Bench before a real model behind a real server, `transformers serve` (slow; with a real chat model: real)."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import Command, read_jsonl
from test_judge import ASKED, DATA
from test_real import MISSING, model  # noqa: F401

there = find_spec("fastapi") is not None and find_spec("uvicorn") is not None
pytestmark = pytest.mark.skipif(not there, reason="transformers[serving] is not installed")


@contextmanager
def served(folder: Path, log: Path) -> Iterator[str]:
    """The address of a server of this model, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--port", str(port)]
    with log.open("wb") as stream:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        server = subprocess.Popen([*words, "--host", "127.0.0.1"], stdout=stream, stderr=stream, env=environment)
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(20)


@pytest.mark.slow
def test_a_served_model_judges(train: Callable[..., Path], command: Command, tmp_path: Path) -> None:
    """An iterate of the run itself: it has nothing to say, which is no grade, and every word of it is kept."""
    root = train("schedule.iterations=1")
    file, judge = tmp_path / "q.jsonl", root / "iterate-01/model"
    file.write_text("".join(json.dumps(row) + "\n" for row in ASKED[:2]))
    words = ["evaluation=mt_bench", f"evaluation.mt_bench.questions={file}", "evaluation.mt_bench.max_new_tokens=8"]
    words += ["evaluation.judge.key_variable=null", "evaluation.judge.max_tokens=12", f"evaluation.judge.model={judge}"]
    with served(judge, tmp_path / "log") as address:
        result = command("evaluate", str(root), *words, f"evaluation.judge.base_url={address}")
    assert result.code == 0, result.err
    folders = sorted(path.name for path in (root / "iterate-01/mt_bench").iterdir())
    assert [name.partition("-")[0] for name in folders] == ["answers", "pairwise", "single"]
    found = json.loads((root / "iterate-01/mt_bench" / folders[2] / "results.json").read_text())
    verdicts = read_jsonl(root / "iterate-01/mt_bench" / folders[2] / "verdicts.jsonl")
    assert len(verdicts) == found["asked"] == found["verdicts"] == 4
    assert found["judged"] == sum(row["value"] is not None for row in verdicts)
    assert found["unparsable"] == 4 - found["judged"] and 0 < found["tokens"]["written"] <= 4 * 12
    assert all(row["finish_reason"] in ("stop", "length") for row in verdicts)
    assert "nothing to do" in command("evaluate", str(root)).err  # the server is gone


@pytest.mark.real
@pytest.mark.timeout(1500)
@pytest.mark.skipif(MISSING or not DATA.exists(), reason="no real model and questions beside this checkout")
def test_a_chat_model_answers_two_real_questions_and_is_judged_by_itself(
    model: Path,  # noqa: F811
    command: Command,
    tmp_path: Path,
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{a}+1?", "response": f"{a + 1}"}) + "\n" for a in range(8)))
    words = ["model=pretrained", f"model.name_or_path={model}", "dataset=jsonl", f"dataset.path={rows}", "tracker=none"]
    words += ["dataset.num_prompts=4", "dataset.num_heldout=2", "generation.max_new_tokens=8", "schedule.iterations=1"]
    words += ["evaluation=mt_bench", f"evaluation.mt_bench.questions={DATA / 'question.jsonl'}"]
    words += [f"evaluation.mt_bench.references={DATA / 'reference_answer-gpt-4.jsonl'}", "evaluation.mt_bench.limit=2"]
    words += [
        "evaluation.mt_bench.max_new_tokens=48",
        "evaluation.judge.max_tokens=96",
        "evaluation.judge.modes=[single]",
    ]
    words += ["evaluation.judge.key_variable=null", "evaluation.judge.concurrency=1", f"evaluation.judge.model={model}"]
    with served(model, tmp_path / "log") as address:
        words += [f"evaluation.judge.base_url={address}", f"outputs={tmp_path}", "run_name=run"]
        result = command("train", *words)
    assert result.code == 0, result.err
    for k in (0, 1):
        (verdicts,) = (tmp_path / f"run/iterate-{k:02d}/mt_bench").glob("single-*/verdicts.jsonl")
        found = read_jsonl(verdicts)
        assert [(row["question_id"], row["turn"]) for row in found] == [("81", 1), ("81", 2), ("82", 1), ("82", 2)]
        assert all(len(row["text"]) > 20 for row in found)
