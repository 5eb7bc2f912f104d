"""What is taken out of a run: answers of its iterates, a model with its card, pairs for TRL and SPIN."""

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import SMALL, Command, Result, read_jsonl, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin_reg.fingerprint import file_sha256 as sha256
from spin_reg.logprobs import collate, token_logprobs

Swept = tuple[Path, Result]
FORMULA = "1/2 log pi_0(y) + 1/2 log pi_1(y)"  # of iteration 1


@pytest.fixture
def run(swept: Swept) -> Path:
    (found,) = swept[0].glob("tiny-toy-kl-alpha0.5-seed0-*")
    return found


def pairs(root: Path, t: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(root / f"iteration-{t:02d}" / "pairs.parquet").to_pylist()
    return rows


def judged(root: Path) -> dict[int, float]:
    rows = read_jsonl(root / "metrics.jsonl")
    return {row["iterate"]: row["eval/heldout_nll"] for row in rows if "iterate" in row}


def test_the_likeliest_answer_is_that_of_a_plain_loop(run: Path, command: Command) -> None:
    words = ["--prompt", "A1", "--prompt", "B2", "--temperature", "0", "--iterate", "2", "--json"]
    result = command("sample", str(run), *words)
    assert result.code == 0, result.err
    model = AutoModelForCausalLM.from_pretrained(run / "iterate-02/model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "iterate-02/model")
    for line, prompt in zip(result.out.splitlines(), ("A1", "B2"), strict=True):
        said = json.loads(line)
        ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)[
            "input_ids"
        ]
        drawn: list[int] = []
        while len(drawn) < 32 and tokenizer.eos_token_id not in drawn:
            with torch.no_grad():
                drawn.append(int(model(input_ids=torch.tensor([ids + drawn])).logits[0, -1].argmax()))
        assert (said["iterate"], said["ids"]) == (2, drawn)


@pytest.mark.slow
def test_draws_hang_on_seed_and_prompt_alone(run: Path, command: Command) -> None:
    def answers(*words: str) -> list[str]:
        result = command("sample", str(run), "--json", *words)
        assert result.code == 0, result.err
        return [json.loads(line)["answer"] for line in result.out.splitlines()]

    both = answers("--prompt", "A1", "--prompt", "C3")
    assert answers("--prompt", "C3", "--prompt", "A1") == both[::-1] and answers("--prompt", "A1") == both[:1]
    assert len({*answers(*["--prompt", "A1"] * 8)}) > 1 and answers("--prompt", "A1", "--seed", "1") != both[:1]


def test_iterates_are_named_alike_everywhere(run: Path, command: Command, tmp_path: Path) -> None:
    nll = judged(run)
    best = min(nll, key=lambda k: nll[k])
    words = [word for name in ("base", "best", "last") for word in ("--iterate", name)]
    shown = command("sample", str(run), "--prompt", "A1", "--json", *words)
    assert [json.loads(line)["iterate"] for line in shown.out.splitlines()] == [0, best, 2]
    exported = command("export", str(run), "--iterate", "best", "--to", str(tmp_path / "model"))
    assert exported.code == 0 and weights(run, best) == sha256(tmp_path / "model/model.safetensors")
    for words in (["--iterate", "7"], ["--iterate", "best", "--by", "nothing"]):
        result = command("sample", str(run), "--prompt", "A1", *words)
        assert result.code == 2 and len(result.err.splitlines()) == 4


def test_a_model_goes_with_its_card(run: Path, command: Command, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    assert command("export", str(run), "--to", str(tmp_path / "mine"), "--license", "apache-2.0").code == 0
    card = ModelCard.load(tmp_path / "mine/README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "transformers")
    assert f"{judged(run)[2]:.4g}" in card.text and FORMULA in card.text
    scope: dict[str, Any] = {}
    code = (
        card.text.partition("```python\n")[2]
        .partition("```")[0]
        .replace('name = "mine"', f"name = {str(tmp_path / 'mine')!r}")
    )
    exec(code, scope)  # what it says about loading is so
    assert type(scope["model"]).__name__ == "LlamaForCausalLM"


def test_pairs_for_trl_are_ours(run: Path, command: Command, tmp_path: Path) -> None:
    assert command("export", str(run), "--format", "trl", "--iteration", "1", "--to", str(tmp_path / "p")).code == 0
    rows = pq.read_table(next((tmp_path / "p/data").glob("*.parquet"))).to_pylist()
    tokenizer = AutoTokenizer.from_pretrained(run / "iterate-02/model")
    for row, pair in zip(rows, pairs(run, 1), strict=True):
        assert [row[f"{kind}_ids"] for kind in ("prompt", "chosen", "rejected")] == [
            pair[f"{kind}_ids"] for kind in ("prompt", "real", "generated")
        ]
        assert row["ref_chosen_logps"] == pair["reference_real_logprob"]
        assert row["ref_rejected_logps"] == pair["reference_generated_logprob"]
        assert tokenizer(row["prompt"] + row["chosen"])["input_ids"] == pair["prompt_ids"] + pair["real_ids"]


def test_spin_reads_pairs_and_so_does_our_own_reader(run: Path, command: Command, tmp_path: Path) -> None:
    from datasets import load_dataset

    folder = tmp_path / "spin"
    assert command("export", str(run), "--format", "spin", "--iteration", "0", "--to", str(folder)).code == 0
    rows = load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    for row, pair in zip(rows, pairs(run, 0), strict=True):
        assert [message["role"] for message in row["real"]] == ["user", "assistant"]
        assert (row["real"][-1]["content"], row["generated"][-1]["content"]) == (pair["real"], pair["generated"])
    result = command("plan", *SMALL, "dataset=spin_iter0", f"dataset.path={folder}", f"outputs={tmp_path / 'o'}")
    assert result.code == 0, result.err


@pytest.mark.slow
def test_trl_trains_on_what_was_exported_as_the_card_says(run: Path, command: Command, tmp_path: Path) -> None:
    """Its first loss over all pairs is the mean logistic loss, by a plain forward and the references of our pairs."""
    trl = pytest.importorskip("trl", reason="it is an extra: pip install spin-reg[trl]")
    from datasets import load_dataset

    assert command("export", str(run), "--format", "trl", "--iteration", "1", "--to", str(tmp_path / "p")).code == 0
    assert command("export", str(run), "--iterate", "1", "--to", str(tmp_path / "policy")).code == 0
    rows = load_dataset(str(tmp_path / "p"), split="train", cache_dir=str(tmp_path / "cache"))

    class Precomputed(trl.DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    how = trl.DPOConfig(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=len(rows),
        beta=1.0,
        max_length=None,
        max_steps=1,
        logging_steps=1,
        learning_rate=0.0,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    trainer = Precomputed(
        model=AutoModelForCausalLM.from_pretrained(tmp_path / "policy"),
        args=how,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "policy"),
    )
    trainer.precompute_ref_logps = True
    trainer.train()
    model = AutoModelForCausalLM.from_pretrained(run / "iterate-01/model").eval()
    losses = []
    for pair in pairs(run, 1):
        delta = 0.0
        for sign, kind in ((1, "real"), (-1, "generated")):
            with torch.no_grad():
                logprob = float(token_logprobs(model, collate([pair["prompt_ids"]], [pair[f"{kind}_ids"]])).sum())
            delta += sign * (logprob - pair[f"reference_{kind}_logprob"])
        losses.append(math.log1p(math.exp(-delta)))
    assert trainer.state.log_history[0]["loss"] == pytest.approx(sum(losses) / len(losses), abs=2e-5)
