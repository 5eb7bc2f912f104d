"""Pretrained models from a folder: used as they are, scored without dropout, refused when they change."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SMALL, Command, read_jsonl
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from spin_reg import iterates, models
from spin_reg.logprobs import collate, sequence_logprobs

OWN = [word for word in SMALL if not word.startswith("model.")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 with heavy dropout everywhere, and a chat template."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = models.byte_tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=128, eos_token_id=tokenizer.eos_token_id,
        resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5, initializer_range=0.2,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def words(base: Path, outputs: Path) -> list[str]:
    own = [*OWN, "model=pretrained", f"model.name_or_path={base}", "schedule.optimizer=adamw", "run_name=run"]
    return [*own, f"outputs={outputs}", "schedule.epochs=1", "schedule.beta=0.5"]


def test_a_base_is_used_as_it_is_and_dropout_never_touches_a_log_prob(
    base: Path, command: Command, tmp_path: Path
) -> None:
    for i, more in enumerate(([], ["hardware.gradient_checkpointing=true"])):
        result = command("train", *words(base, tmp_path / str(i)), "regularizer=none", *more)
        assert result.code == 0, result.err
        root = tmp_path / str(i) / "run"
        saved = json.loads((root / "iterate-00/base.json").read_text())
        assert saved["name"] == str(base) and len(saved["sha256"]) == 64
        assert not (root / "iterate-00/model").exists()
        first = [r for r in read_jsonl(root / "metrics.jsonl") if r["step"] == 1 and "train/loss" in r]
        assert [r["iteration"] for r in first] == [0, 1]
        assert all(math.isclose(r["train/loss"], math.log(2), abs_tol=1e-6) for r in first)
        config = json.loads((root / "iterate-02/model/config.json").read_text())
        assert config["resid_pdrop"] == 0.5  # the model is handed on as it came


def test_a_scored_model_gives_one_answer_whatever_its_dropout(base: Path) -> None:
    from spin_reg.settings import Dtype
    from spin_reg.specs import Policy

    model = iterates.load(base, Policy(Dtype.float32, None, None)).model
    batch = collate([[1, 2], [3]], [[4, 5, 6], [7]])
    with torch.no_grad():
        assert torch.equal(sequence_logprobs(model, batch), sequence_logprobs(model, batch))
    iterates.forget()


@pytest.mark.slow
def test_an_sft_stage_can_come_first(base: Path, command: Command, tmp_path: Path) -> None:
    more = ["model.sft.epochs=1", "model.sft.learning_rate=1e-3", "schedule.iterations=1"]
    result = command("train", *words(base, tmp_path), *more)
    assert result.code == 0, result.err
    root = tmp_path / "run"
    assert (root / "iterate-00/model/model.safetensors").exists()
    assert any("sft/loss" in row for row in read_jsonl(root / "metrics.jsonl"))


@pytest.mark.slow
def test_a_base_that_changed_is_refused(base: Path, command: Command, tmp_path: Path) -> None:
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    assert command("train", *words(copy, tmp_path), "schedule.iterations=1").code == 0
    torch.manual_seed(1)
    model = GPT2LMHeadModel.from_pretrained(copy)
    model.transformer.wte.weight.data.add_(1e-3)
    model.save_pretrained(copy)
    result = command("train", *words(copy, tmp_path), "schedule.iterations=2")
    assert result.code == 2 and "iterate-00/base was made with other settings" in result.err
    assert "files of the model: SHA-256" in result.err


def test_weights_that_are_not_whole_are_named(base: Path, command: Command, tmp_path: Path) -> None:
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    result = command("train", *words(copy, tmp_path / "o"))
    assert result.code == 1 and "cannot be read" in result.err and str(copy) in result.err


@pytest.mark.parametrize(
    ("name", "other", "says"),
    [("transformer.h.0.ln_1.weight", None, "transformer.h.0.ln_1.weight would be random: not in its files"),
     ("transformer.h.1.ln_1.bias", "module.transformer.h.1.ln_1.bias", "which have module.transformer.h.1.ln_1.bias")],
    ids=["lacking", "renamed"],
)  # fmt: skip
def test_weights_that_would_be_made_up_are_refused(
    name: str, other: str | None, says: str, base: Path, command: Command, tmp_path: Path
) -> None:
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    weights = load_file(copy / "model.safetensors")
    weights |= {other: weights[name]} if other else {}
    save_file(
        {key: value for key, value in weights.items() if key != name}, copy / "model.safetensors", {"format": "pt"}
    )
    result = command("train", *words(copy, tmp_path / "o"))
    assert result.code == 1 and says in result.err.replace("\n", " "), result.err


def test_weights_without_a_place_are_named(base: Path, command: Command, tmp_path: Path) -> None:
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    weights = load_file(copy / "model.safetensors") | {"transformer.h.0.extra": torch.ones(1)}
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    result = command("train", *words(copy, tmp_path / "o"), "schedule.iterations=1", "evaluation=none")
    assert result.code == 0 and "no place for transformer.h.0.extra" in result.err, result.err


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "no safetensors weights"),
        (lambda f: (f / "chat_template.jinja").unlink(), "no chat template"),
    ],
    ids=["config", "weights", "template"],
)
def test_a_folder_that_is_no_chat_model_exits_2_and_leaves_nothing(
    damage: Callable[[Path], None], named: str, base: Path, command: Command, tmp_path: Path
) -> None:
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    damage(copy)
    result = command("train", *words(copy, tmp_path / "o"))
    assert result.code == 2 and named in result.err, result.err
    assert not (tmp_path / "o").exists()


def test_a_model_that_is_nowhere_exits_2(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = command("train", *words(Path("no/such-model"), tmp_path / "o"))
    assert result.code == 2 and "no/such-model" in result.err and "Hub" in result.err
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_checkpointing_brings_no_dropout_back(command: Command, tmp_path: Path) -> None:
    """OPT's layers drop out by a rate of their own whenever they believe they train."""
    folder = tmp_path / "opt"
    tokenizer = models.byte_tokenizer()
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=16,
        word_embed_proj_dim=16, max_position_embeddings=1024, dropout=0.5, attention_dropout=0.5, layerdrop=0.0,
        eos_token_id=tokenizer.eos_token_id, init_std=0.2,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    more = ["regularizer=none", "schedule.iterations=1", "hardware.gradient_checkpointing=true"]
    result = command("train", *words(folder, tmp_path / "o"), *more)
    assert result.code == 0, result.err
    first = next(r for r in read_jsonl(tmp_path / "o/run/metrics.jsonl") if "train/loss" in r)
    assert math.isclose(first["train/loss"], math.log(2), abs_tol=1e-6)


def test_without_a_generation_config_the_models_own_end_counts_everywhere(base: Path, tmp_path: Path) -> None:
    from spin_reg.settings import Pretrained

    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    (copy / "generation_config.json").unlink()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"eos_token_id": 5}))
    settings = Pretrained(name_or_path=str(copy))
    prepared = models.end_ids(models.generation_config(settings), models.load_tokenizer(settings))
    assert prepared == models.start(settings).end_ids == tuple(sorted({5, models.byte_tokenizer().eos_token_id}))
