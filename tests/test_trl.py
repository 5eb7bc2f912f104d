"""An independent implementation as an oracle: TRL's DPO trainer on the pairs of our run (slow; extra `trl`)."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from conftest import Command, read_jsonl

from spin_reg import models

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("alpha", [0, 0.5, 1])
@pytest.mark.parametrize(("ours", "theirs"), [("logistic", "sigmoid"), ("hinge", "hinge")])
def test_trl_gives_our_first_loss_on_our_pairs(
    ours: str, theirs: str, alpha: float, train: Callable[..., Path], tmp_path: Path
) -> None:
    """TRL gets our pairs' token ids and our reference log-probs as its precomputed columns; batch = all pairs."""
    trl = pytest.importorskip("trl", reason="the oracle is an extra: pip install spin-reg[trl]")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = [f"alpha={alpha}", f"loss={ours}", "schedule.batch_size=24", "schedule.beta=0.3", "schedule.warmup_ratio=0"]
    root = train(*words, "schedule.iterations=2")
    rows = pq.read_table(root / "iteration-01/pairs.parquet").to_pylist()
    folder = root / "iterate-01/model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    columns = {
        "prompt_ids": [row["prompt_ids"] for row in rows],
        "chosen_ids": [row["real_ids"] for row in rows],
        "rejected_ids": [row["generated_ids"] for row in rows],
        "ref_chosen_logps": [row["reference_real_logprob"] for row in rows],
        "ref_rejected_logps": [row["reference_generated_logprob"] for row in rows],
    }
    trainer = trl.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "trl"),
            per_device_train_batch_size=24,
            beta=0.3,
            loss_type=[theirs],
            precompute_ref_log_probs=False,
            report_to=[],
            use_cpu=True,
            bf16=False,
            max_steps=1,
            logging_steps=1,
            learning_rate=0.0,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_dict({key: ["x"] * 24 for key in ("prompt", "chosen", "rejected")}),
        processing_class=tokenizer,
    )
    trainer.precompute_ref_logps = True  # its own pass would tokenise text anew; it gets ids and references instead
    trainer.train_dataset = Dataset.from_dict(columns)
    trainer.train()
    theirs_logged = trainer.state.log_history[0]
    mine = next(r for r in read_jsonl(root / "metrics.jsonl") if r.get("iteration") == 1 and r["step"] == 1)
    assert theirs_logged["loss"] == pytest.approx(mine["train/loss"], abs=2e-5), json.dumps(theirs_logged)
    assert theirs_logged["rewards/margins"] == pytest.approx(mine["train/margin"], abs=2e-4)
    assert torch.isfinite(torch.tensor(theirs_logged["loss"]))


ONE_STEP = (
    "per_device_train_batch_size=24, max_steps=1, logging_steps=1, learning_rate=0.0, report_to=[], use_cpu=True, "
)
ONE_STEP += "bf16=False, gradient_checkpointing=False, "
LEARNED = ["model.hidden_size=32", "model.sft.epochs=30", "schedule.batch_size=24", "schedule.beta=0.3"]


@pytest.mark.parametrize("loss", ["logistic", "hinge"])
def test_trl_trains_on_an_export_as_its_readme_says(
    loss: str, train: Callable[..., Path], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """README's own lines, with all pairs in one step: TRL's first loss and margin are ours."""
    pytest.importorskip("trl", reason="the oracle is an extra: pip install spin-reg[trl]")
    root = train(*LEARNED, f"loss={loss}", "schedule.warmup_ratio=0")
    policy, pairs = tmp_path / "policy", tmp_path / "pairs"
    assert command("export", str(root), "--iterate", "1", "--to", str(policy)).code == 0
    assert command("export", str(root), "--format", "trl", "--to", str(pairs)).code == 0
    (code,) = re.findall(r"```python\n(.*?)```", (pairs / "README.md").read_text(), flags=re.S)
    code = code.replace("DPOConfig(", f"DPOConfig({ONE_STEP}", 2).replace(
        f"import DPOConfig({ONE_STEP}", "import DPOConfig("
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    scope: dict[str, object] = {}
    exec(code, scope)
    logged = scope["trainer"].state.log_history[0]  # type: ignore[attr-defined]
    mine = next(r for r in read_jsonl(root / "metrics.jsonl") if r.get("iteration") == 1 and r["step"] == 1)
    assert logged["loss"] == pytest.approx(mine["train/loss"], abs=2e-5), json.dumps(logged)
    assert logged["rewards/margins"] == pytest.approx(mine["train/margin"], abs=2e-4)
    assert abs(mine["train/margin"]) > 1e-3  # the reference is a mixture, so there is something to tell


def test_trl_s_own_tokenisation_gives_our_ids_where_the_readme_says(
    train: Callable[..., Path], command: Command, tmp_path: Path
) -> None:
    """The rows given to the plain trainer: as many as README counts come out as the ids that we trained on."""
    trl = pytest.importorskip("trl", reason="the oracle is an extra: pip install spin-reg[trl]")
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root = train(*LEARNED)
    assert command("export", str(root), "--format", "trl", "--to", str(tmp_path / "pairs")).code == 0
    found = load_dataset(str(tmp_path / "pairs"), split="train", cache_dir=str(tmp_path / "cache"))
    folder = root / "iterate-01/model"
    trainer = trl.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        args=trl.DPOConfig(output_dir=str(tmp_path / "trl"), report_to=[], use_cpu=True, bf16=False, max_steps=1),
        train_dataset=found.remove_columns(["prompt_ids", "chosen_ids", "rejected_ids"]),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    ids = ("prompt_ids", "chosen_ids", "rejected_ids")
    same = sum(
        all(row[key] == ours[key] for key in ids) for row, ours in zip(trainer.train_dataset, found, strict=True)
    )
    assert same > 12 and f"of {same} of the 24 rows" in " ".join((tmp_path / "pairs/README.md").read_text().split())
    trainer.train()


def test_spin_s_layout_is_read_by_us_as_what_spin_published(
    train: Callable[..., Path], command: Command, tmp_path: Path
) -> None:
    """Iteration 0 of a new run trains on the exported answers: the same ids, for the rows that README counts."""
    root = train(*LEARNED)
    assert (
        command("export", str(root), "--format", "spin", "--iteration", "0", "--to", str(tmp_path / "pairs")).code == 0
    )
    tokenizer = models.byte_tokenizer()
    ours = pq.read_table(root / "iteration-00/pairs.parquet").to_pylist()
    by_text = {
        (p["prompt"], p["real"], p["generated"]): p["generated_ids"] for p in ours if p["finish_reason"] == "stop"
    }
    words = [
        "dataset=spin_iter0",
        f"dataset.path={tmp_path / 'pairs'}",
        "dataset.num_prompts=12",
        "dataset.num_heldout=4",
    ]
    again = train(*LEARNED, *words, "schedule.iterations=1", "evaluation=none", name="again")
    pairs = pq.read_table(again / "iteration-00/pairs.parquet").to_pylist()
    seen = 0
    for pair in pairs:
        expected = by_text.get((pair["prompt"], pair["real"], pair["generated"]))
        if expected is not None and tokenizer.encode(pair["generated"], add_special_tokens=False) == expected[:-1]:
            assert pair["generated_ids"] == expected
            seen += 1
    assert len(pairs) == 12 and seen > 6
