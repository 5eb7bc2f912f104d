"""A real chat model on real data, where both lie beside the checkout (marked `real`)."""

import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT, Command, read_jsonl
from filelock import FileLock

from spin_reg.specs import Split

SHARED = ROOT.parent / "shared"
DATA, TOOL = SHARED / "data" / "gsm8k" / "train.jsonl", SHARED / "tools" / "smollm2.py"
MISSING = not (DATA.exists() and TOOL.exists())
pytestmark = [pytest.mark.real, pytest.mark.skipif(MISSING, reason="no real model and data beside this checkout")]


@pytest.fixture(scope="module")
def model() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder; made by one of the tests' processes, where it is not there."""
    with FileLock(Path(tempfile.gettempdir(), "spin-reg-smollm2.lock")):
        made = subprocess.run([sys.executable, str(TOOL)], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return Path(made.stdout.splitlines()[-1])


def test_two_iterations_and_the_other_road(
    model: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        *("tracker=none", "model=pretrained", f"model.name_or_path={model}", "dataset=jsonl", f"dataset.path={DATA}"),
        *("dataset.num_prompts=4", "dataset.num_heldout=2", "dataset.max_response_tokens=128", "dataset.max_dropped=1"),
        *("generation.max_new_tokens=48", "schedule.iterations=2", "schedule.epochs=1", "schedule.batch_size=2"),
        *("schedule.learning_rate=1e-5", "alpha=0.5", f"outputs={tmp_path}", "run_name=run"),
    ]
    result = command("train", *words)
    assert result.code == 0, result.err
    root = tmp_path / "run"
    assert not (root / "iterate-00/model").exists() and (root / "iterate-00/base.json").exists()
    first = [r for r in read_jsonl(root / "metrics.jsonl") if r.get("step") == 1 and "train/loss" in r]
    assert first[0]["train/loss"] == pytest.approx(0.6931, abs=1e-3)
    assert (root / "data" / f"{Split.heldout}.parquet").exists()
    assert "each is read by itself" not in (root / "run.log").read_text()
    monkeypatch.setattr(sys, "argv", ["verify.py", str(root), "--rows", "4"])
    runpy.run_path(str(ROOT / "scripts" / "verify.py"), run_name="__main__")
    assert capsys.readouterr().out.count("reference off") == 2


def test_real_answers_end_once_and_prompts_are_the_templates(model: Path) -> None:
    from transformers import AutoTokenizer

    from spin_reg import data, models
    from spin_reg.corpora import Jsonl
    from spin_reg.settings import Pretrained

    settings = Pretrained(name_or_path=str(model))
    tokenizer = models.load_tokenizer(settings)
    ends = models.end_ids(models.generation_config(settings), tokenizer)
    splits, _ = data.prepare(Jsonl(path=str(DATA), num_prompts=40, num_heldout=8), tokenizer, ends)
    plain = AutoTokenizer.from_pretrained(model)
    for row in splits[Split.train]:
        assert sum(token in ends for token in row["real_ids"]) == 1 and row["real_ids"][-1] in ends
        text = plain.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], tokenize=False, add_generation_prompt=True
        )
        assert plain.decode(row["prompt_ids"]) == text
        assert plain.decode(row["real_ids"][:-1]) == row["real"]


@pytest.mark.timeout(1500)
def test_ten_iterates_of_an_adapter_take_little_disk(model: Path, command: Command, tmp_path: Path) -> None:
    """The run and the base together take less than 1.3 times the base."""
    words = [
        *("tracker=none", "model=pretrained", f"model.name_or_path={model}", "dataset=jsonl", f"dataset.path={DATA}"),
        *("dataset.num_prompts=2", "dataset.num_heldout=2", "dataset.max_response_tokens=96", "dataset.max_dropped=1"),
        *("generation.max_new_tokens=8", "schedule.iterations=10", "schedule.epochs=1", "schedule.batch_size=2"),
        *("model.lora.rank=8", "schedule.learning_rate=1e-4", "regularizer=none", "evaluation=none"),
        *(f"outputs={tmp_path}", "run_name=run"),
    ]
    result = command("train", *words)
    assert result.code == 0, result.err
    assert (tmp_path / "run/iterate-10/model/adapter_model.safetensors").exists()
    run, base = (sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) for folder in (tmp_path, model))
    assert run + base < 1.3 * base, run / base
    print(f"ten iterates: {run / base:.3f} of the base")


@pytest.mark.timeout(1500)
def test_stages_hold_what_was_estimated(model: Path, tmp_path: Path) -> None:
    """Each in a process of its own, an adapter under autocast; 0.8 to 1.2 of what they then hold at most."""
    script = runpy.run_path(str(ROOT / "scripts/estimates.py"))
    own = ["model=pretrained", f"model.name_or_path={model}", f"dataset.path={DATA}"]
    found = script["case"]([*script["REAL"], *own, *script["REAL_CASES"]["lora bf16"]], tmp_path)
    assert {one.kind for one in found} == {"generate", "score", "train"}
    assert all(0.8 < one.ratio < 1.2 for one in found), found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_are_packed_and_in_float32_no_bit_tells_what_is_read_with_them(model: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from spin_reg import products
    from spin_reg.packing import Group
    from spin_reg.scorer import Scorer

    policy = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    products.quick(policy)
    scorer = Scorer(policy)
    assert scorer.packs
    if dtype == "float32":
        groups = [Group(range(10, 30 + 7 * n), (range(100, 101 + n), range(200, 211 + 9 * n))) for n in range(8)]
        with torch.no_grad():
            alone = torch.cat([scorer([Group(g.prompt, (answer,))]) for g in groups for answer in g.answers])
            together = scorer(groups)
        if products._mkl_is_slow():  # then all large products are oneDNN's
            assert torch.equal(together, alone)
        else:  # MKL on its maker's CPUs rounds a row otherwise beside others
            assert (together - alone).abs().mean() < 1e-5
