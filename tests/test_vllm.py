"""The second engine: asked in an interpreter of its own, it gives answers that are answers, or the run says why not."""

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SMALL, Command
from fake_vllm import REAL, base, interpreter, needs_vllm
from transformers import LlamaForCausalLM

from spin_reg import adapters, iterates, models, sampling, sources, vllm_python
from spin_reg.context import Context
from spin_reg.errors import SpinRegError
from spin_reg.generation import Backend, Generation
from spin_reg.logprobs import collate, sequence_logprobs
from spin_reg.settings import Dtype, Hardware, Lora, Precision, Pretrained
from spin_reg.specs import GenerateSpec, Policy, Split
from spin_reg.stages import generate
from spin_reg.vllm_engine import Asked, opened

ENDS = (10, 11)
QUICK = [*SMALL, "schedule.iterations=1", "evaluation=none", "run_name=run", "generation.max_new_tokens=4"]


@pytest.fixture(autouse=True)
def forget_gpus() -> None:
    vllm_python.gpus.cache_clear()


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return interpreter(tmp_path_factory.mktemp("fake"))


def asked(python: Path, **other: Any) -> Asked:
    values: dict[str, Any] = {
        "python": str(python),
        "threads": 1,
        "model": "m",
        "adapter": None,
        "dtype": "float32",
        "trust_remote_code": False,
        "prompt": 3,
        "answer": 9,
        "batch_size": 4,
        "temperature": 0.7,
        "top_p": 0.9,
        "ends": ENDS,
    }
    return Asked(**values | other)


def drawn(what: Asked, folder: Path, prompts: list[list[int]], seeds: list[int], poll: Callable[[], None]) -> Any:
    with opened(what, folder, poll=poll, versions=lambda found: None) as engine:
        return engine.draw(prompts, seeds, lambda count: None)


def nobody() -> None:
    """Nobody asks to stop."""


PROMPTS, SEEDS = [[1, 2], [3], [4, 5, 6], [1, 2], [9]], [11, 12, 13, 14, 2**63 - 1]


def test_an_answer_depends_on_its_seed_and_prompt_alone(fake: Path, tmp_path: Path) -> None:
    """Not on order, on what was asked before, nor on how many processes there are."""
    together = drawn(asked(fake), tmp_path, PROMPTS, SEEDS, nobody)
    assert together[0] != together[3], "one prompt, two seeds"
    back = drawn(asked(fake), tmp_path, PROMPTS[::-1], SEEDS[::-1], nobody)[::-1]
    with opened(asked(fake), tmp_path, poll=nobody, versions=lambda found: None) as engine:
        apart = [engine.draw([p], [s], lambda count: None)[0] for p, s in zip(PROMPTS, SEEDS, strict=True)]
    assert together == back == apart
    assert {reason for _, reason in together} <= {"stop", "length"}


def test_each_gpu_has_a_process_of_its_own(fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = drawn(asked(fake), tmp_path, PROMPTS, SEEDS, nobody)
    vllm_python.gpus.cache_clear()
    for name, value in (("GPUS", "2"), ("CUDA_VISIBLE_DEVICES", "3,5"), ("TOLD", str(tmp_path / "told"))):
        monkeypatch.setenv(name, value)
    assert drawn(asked(fake), tmp_path, PROMPTS, SEEDS, nobody) == one
    told = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    loads = [row for row in told if "loaded" in row]
    assert sorted(row["gpu"] for row in loads) == ["3", "5"] and not any(r["loaded"]["enforce_eager"] for r in loads)
    assert sorted(row["gpu"] for row in told if "seed" in row) == ["3", "3", "3", "5", "5"]
    assert all(gone(row["pid"]) for row in loads)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize(
    ("how", "what", "why"),
    [
        ("unloadable", "ended before", "exit code 1; it said last: .*Head size 8 is not supported"),
        ("crash2", "ended before", "signal 9 .*memory.*out of memory, alas"),
        ("beyond", "no answer", "tokens"),
    ],
)
def test_a_process_that_fails_is_told_with_its_last_words(
    how: str, what: str, why: str, fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE", how)
    with pytest.raises(SpinRegError, match=what) as caught:
        drawn(asked(fake), tmp_path, PROMPTS, SEEDS, nobody)
    assert re.search(why, caught.value.why) and "it goes on" in caught.value.todo
    assert len(str(caught.value).splitlines()) == 4


def test_a_stop_ends_it_at_once(fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE", "hang0")
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))

    def poll() -> None:
        if (tmp_path / "told").exists() and '"prompt"' in (tmp_path / "told").read_text():
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        drawn(asked(fake), tmp_path, PROMPTS, SEEDS, poll)
    pid = json.loads((tmp_path / "told").read_text().splitlines()[0])["pid"]
    assert gone(pid) and time.monotonic() - began < 8


def words(fake: Path, outputs: Path) -> list[str]:
    return ["train", *QUICK, "generation=vllm", f"generation.python={fake}", f"outputs={outputs}"]


def test_a_run_asks_as_it_is_set_and_goes_on_after_a_kill(
    fake: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 rows in shards of 8: the process dies in the third, and what is asked for then is that one alone."""
    monkeypatch.setattr(generate, "SHARD", 8)
    assert command(*words(fake, tmp_path / "straight")).code == 0
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    monkeypatch.setenv("FAKE", "crash18")
    failed = command(*words(fake, tmp_path / "o"))
    assert failed.code == 1 and "out of memory, alas" in failed.err
    before = len([line for line in (tmp_path / "told").read_text().splitlines() if '"prompt"' in line])
    monkeypatch.setenv("FAKE", "")
    assert command(*words(fake, tmp_path / "o")).code == 0
    told = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    assert len([row for row in told if "seed" in row]) - before == 8
    loaded = told[0]["loaded"]
    assert loaded["generation_config"] == "vllm" and loaded["load_format"] == "safetensors"
    assert (loaded["dtype"], loaded["max_num_seqs"], loaded["enable_chunked_prefill"]) == ("float32", 32, False)
    answers = "run/iterate-00/answers/train-00"
    files = [tmp_path / place / answers for place in ("o", "straight")]
    assert (files[0] / "answers.parquet").read_bytes() == (files[1] / "answers.parquet").read_bytes()
    assert not (files[0] / "scores.parquet").exists(), "vLLM's log-probs are no scores"
    assert json.loads((files[0] / "engine.json").read_text())["versions"] == ["0.32.0"]
    for row in pq.read_table(files[0] / "answers.parquet").to_pylist():
        assert 0 < len(row["generated_ids"]) <= 4
        assert (row["finish_reason"] == "stop") == (row["generated_ids"][-1] == 259)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["generation.python=/no/such"], "cannot be run"),
        (["generation.python=null"], "has no vLLM"),
        (["generation.temperature=2.5"], "from 0.01 to 2"),
        (["generation.backend=transformers"], "leave it out"),
        (["model=pretrained", "model.name_or_path=m", "model.gguf_file=m.gguf"], "safetensors"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(
    more: list[str], why: str, fake: Path, command: Command, tmp_path: Path
) -> None:
    other = any(word.startswith("model=") for word in more)
    given = [word for word in words(fake, tmp_path / "o") if not (other and word.startswith("model."))]
    result = command(*given, *more)
    assert result.code == 2 and why in result.err and not (tmp_path / "o").exists()


def test_a_version_that_was_never_tried_is_refused(tmp_path: Path, command: Command) -> None:
    other = interpreter(tmp_path, "0.31.4", "vllm")
    result = command(*words(other, tmp_path / "o"))
    assert result.code == 2 and "0.31.4" in result.err and not (tmp_path / "o").exists()


# With the real one

COUNT, MANY, LENGTH = 400, 2000, 12


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    base(folder, positions=64, spread=0.2)
    return folder


def of_both(policy: Path, folder: Path, temperature: float) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Prompts, our answers at temperature 1 (0 where that is asked), and vLLM's at the temperature."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, 5).tolist() for _ in range(COUNT)]
    model = LlamaForCausalLM.from_pretrained(policy).eval()
    ends = (model.config.eos_token_id,)
    points = torch.from_numpy(rng.random((COUNT, LENGTH)))
    own = sampling.sample(model, prompts, points, ends=ends, temperature=min(1.0, temperature / 0.5), top_p=1.0)
    other: dict[str, Any] = {"model": str(policy), "prompt": 5, "answer": LENGTH, "batch_size": 64}
    what = asked(Path(str(REAL)), **other, temperature=temperature, top_p=1.0, ends=ends)
    theirs = drawn(what, folder, prompts, list(range(COUNT)), nobody)
    return prompts, [answer.ids for answer in own], [ids for ids, _ in theirs]


def differ(model: Any, prompts: list[list[int]], ours: list[list[int]], theirs: list[list[int]]) -> list[float]:
    """p-values of equal laws of the log-prob a token under the policy: Kolmogorov-Smirnov, and of equal means."""
    stats = pytest.importorskip("scipy.stats")
    with torch.no_grad():
        some, others = (
            (sequence_logprobs(model, collate(prompts, a)) / torch.tensor([len(ids) for ids in a])).numpy()
            for a in (ours, theirs)
        )
    return [float(stats.ks_2samp(some, others).pvalue), float(stats.ttest_ind(some, others).pvalue)]


@needs_vllm
@pytest.mark.slow
def test_both_engines_draw_from_one_law(policy: Path, tmp_path: Path) -> None:
    """False alarms: 2 in 1000, were the seeds not fixed. Answers at temperature 0.8 must be told from them."""
    model = LlamaForCausalLM.from_pretrained(policy).eval()
    assert min(differ(model, *of_both(policy, tmp_path, 1.0))) > 1e-3
    assert max(differ(model, *of_both(policy, tmp_path, 0.8))) < 1e-3


@needs_vllm
@pytest.mark.slow
def test_greedy_answers_are_mostly_the_same(policy: Path, tmp_path: Path) -> None:
    _, ours, theirs = of_both(policy, tmp_path, 0.0)
    assert np.mean([a == b for a, b in zip(ours, theirs, strict=True)]) > 0.95


@needs_vllm
@pytest.mark.slow
def test_more_prompts_than_vllm_reads_at_once_are_answered_as_a_few_are(policy: Path, tmp_path: Path) -> None:
    """15000 tokens, where it reads 4096: it would split a prompt, and a CPU's seeded draws do not survive that."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, 50).tolist() for _ in range(300)]
    other: dict[str, Any] = {"model": str(policy), "prompt": 50, "answer": LENGTH, "temperature": 1.0, "top_p": 1.0}
    made = [
        drawn(asked(Path(str(REAL)), **other, batch_size=size), tmp_path, prompts, list(range(300)), nobody)
        for size in (300, 8)
    ]
    assert np.mean([a == b for a, b in zip(*made, strict=True)]) > 0.95


@pytest.fixture(scope="module")
def game(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts, and iterates as a run has them: `whole` and `half` are weights of two dtypes, the others the base with
    an adapter, whose scale in `weak` is half of that in `adapter`.
    """
    root = tmp_path_factory.mktemp("game")
    (root / "data").mkdir()
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 256, 5).tolist() for _ in range(MANY)]
    rows = {"example_id": [str(n) for n in range(MANY)], "prompt_ids": pa.array(prompts, pa.list_(pa.int32()))}
    pq.write_table(pa.table(rows), root / "data/train.parquet")
    spec = Pretrained(name_or_path=str(policy))
    for name, dtype in (("whole", Dtype.float32), ("half", Dtype.bfloat16)):
        iterates.save(models.start(Pretrained(name_or_path=str(policy), dtype=dtype)), root / name)
    for name, alpha in (("adapter", 8), ("weak", 4)):
        loaded = models.start(spec)
        model: Any = adapters.fresh(loaded.model, Lora(rank=4, alpha=alpha), 0)
        torch.manual_seed(2)
        for key, weight in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(weight, std=0.5)
        (root / name).mkdir()
        made = models.Loaded(model, loaded.tokenizer, loaded.end_ids)
        iterates.save(made, root / name, iterates.base_record(spec, sources.model_sha256(spec)))
    return root


def by_stage(game: Path, iterate: str, out: Path, seed: int, backend: Backend, **how: Any) -> list[list[int]]:
    """Answers as a stage keeps them."""
    dtype, precision, temperature = how["dtype"], how["precision"], how.get("temperature", 1.0)
    python = REAL if backend is Backend.vllm else None
    spec = GenerateSpec(
        k=1,
        split=Split.train,
        round=0,
        draw=None,
        generation=Generation(temperature=temperature, batch_size=64, backend=backend, python=python),
        max_new_tokens=LENGTH,
        seed=seed,
        policy=Policy(dtype, None, None),
        hardware=Hardware(precision=precision, threads=1),
    )
    out.mkdir()
    generate.run(spec, {"data": game / "data", "model": game / iterate}, out, Context())
    answers: list[list[int]] = pq.read_table(out / "answers.parquet")["generated_ids"].to_pylist()
    return answers


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    ("iterate", "dtype", "precision"),
    [
        ("half", Dtype.bfloat16, Precision.fp32),
        ("whole", Dtype.float32, Precision.bf16),
        ("adapter", Dtype.float32, Precision.fp32),
        ("adapter", Dtype.bfloat16, Precision.fp32),
        ("adapter", Dtype.float32, Precision.bf16),
    ],
)
def test_a_stage_draws_from_the_iterate_by_either_engine(
    iterate: str, dtype: Dtype, precision: Precision, game: Path, tmp_path: Path
) -> None:
    """In coarse arithmetic, and from an adapter. False alarms: 2 in 1000 a case, were the seeds not fixed.

    What must be told from the iterate's answers at temperature 1: those at 0.95, and those of half an adapter or none.
    """
    how: dict[str, Any] = {"dtype": dtype, "precision": precision}
    prompts = pq.read_table(game / "data/train.parquet")["prompt_ids"].to_pylist()
    model = iterates.load(game / iterate, Policy(dtype, None, None), exclusive=True).model.float()
    ours = by_stage(game, iterate, tmp_path / "ours", 0, Backend.transformers, **how)
    theirs = by_stage(game, iterate, tmp_path / "theirs", 0, Backend.vllm, **how)
    fine = (dtype, precision) == (Dtype.float32, Precision.fp32)
    assert json.loads((tmp_path / "theirs/engine.json").read_text())["dtype"] == ("float32" if fine else "bfloat16")
    assert min(differ(model, prompts, ours, theirs)) > 1e-3
    others = [(iterate, 0.95)] + ([("weak", 1.0), ("whole", 1.0)] if iterate == "adapter" else [])
    for n, (name, temperature) in enumerate(others):
        words = how | {"temperature": temperature}
        wrong = by_stage(game, name, tmp_path / f"wrong-{n}", 1, Backend.transformers, **words)
        assert max(differ(model, prompts, wrong, theirs)) < 1e-3, name


@pytest.mark.slow
def test_it_is_asked_by_one_process_of_several_and_has_none_of_our_modules(
    fake: Path, command: Command, tmp_path: Path
) -> None:
    """Processes of a stage are given our modules by PYTHONPATH, which would be the wrong ones there."""
    words = ["train", *QUICK, "generation.backend=vllm", f"generation.python={fake}"]
    assert command(*words, f"outputs={tmp_path / 'one'}").code == 0
    result = command(*words, f"outputs={tmp_path / 'two'}", "hardware.processes=2")
    assert result.code == 0, result.err
    one, two = (tmp_path / name / "run/iterate-00/answers/train-00/answers.parquet" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_another_interpreter_has_its_own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.setenv("LOCAL_RANK", "1")
    other, own = vllm_python.environment("python"), vllm_python.environment(None)
    assert "PYTHONPATH" not in other and own["PYTHONPATH"] == "/ours"
    assert "LOCAL_RANK" not in other | own and other["HF_HUB_OFFLINE"] == "1"
