"""An independent implementation as an oracle: TRL's DPO trainer on the pairs of our run (slow; extra `trl`)."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from conftest import read_jsonl

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
