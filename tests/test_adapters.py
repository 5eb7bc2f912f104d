"""LoRA: an iterate is the base and one cumulative adapter; what is stored, shared and merged."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, SMALL, Command, read_jsonl
from faults import Killed
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from spin_reg import adapters, checkpoint, iterates, models, sizes
from spin_reg.context import Context
from spin_reg.errors import ConfigError
from spin_reg.logprobs import collate, sequence_logprobs, token_divergences
from spin_reg.packing import Group
from spin_reg.scorer import Scorer
from spin_reg.settings import Dtype, Hardware, Lora, Precision, Pretrained, Quantize
from spin_reg.specs import DivergenceSpec, Policy
from spin_reg.stages import divergence

OWN = [word for word in SMALL if not word.startswith("model.")]
FP32 = Policy(Dtype.float32, None, None)
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors", "base.json", "selfcheck.json", "metrics.jsonl"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a chat template."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = models.byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def words(base: Path, outputs: Path, *more: str) -> list[str]:
    own = [*OWN, "model=pretrained", f"model.name_or_path={base}", "schedule.optimizer=adamw", "run_name=run"]
    return [*own, f"outputs={outputs}", "schedule.epochs=1", "schedule.beta=0.5", "model.lora.rank=4", *more]


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three iterations of fictitious play with an adapter."""
    from spin_reg import cli

    outputs = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        more = ["regularizer=fictitious_play", "schedule.iterations=3"]
        patch.setattr(sys, "argv", ["spin-reg", "train", *words(base, outputs, *more)])
        cli.main()
    assert not end.value.code
    return outputs / "run"


def logprobs(folder: Path) -> torch.Tensor:
    batch = collate([[1, 2, 3], [4]], [[5, 6], [7, 8, 9]])
    with torch.no_grad():
        return sequence_logprobs(iterates.load(folder, FP32).model.cpu(), batch)


def test_an_adapter_on_the_head_is_scored_and_trained_though_the_base_was_read_packed(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    assert Scorer(model).packs
    adapted = adapters.fresh(model, Lora(rank=2, target_modules=["lm_head", "q_proj"]), 0)
    head = adapted.get_base_model().lm_head.lora_B["default"].weight
    torch.nn.init.normal_(head)
    scorer, group = Scorer(adapted), Group([1, 2, 3], ([4, 5, 6], [7]))
    assert not scorer.packs
    plain = adapted(torch.tensor([[1, 2, 3, 4, 5, 6]])).logits[0, 2:-1].log_softmax(-1)
    read = scorer([group])
    assert torch.allclose(read[:3], plain.gather(1, torch.tensor([[4], [5], [6]])).squeeze(1), atol=1e-5)
    read.sum().backward()
    assert head.grad is not None and head.grad.abs().max() > 0


def test_a_name_that_is_no_layers_is_refused_beside_good_ones(base: Path) -> None:
    with pytest.raises(ConfigError, match="no layer is called v_porj"):
        adapters.fresh(AutoModelForCausalLM.from_pretrained(base), Lora(rank=2, target_modules=["q_proj", "v_porj"]), 0)


@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens", "q_proj"]])
def test_an_adapter_that_a_merge_would_spread_over_tied_embeddings_is_refused(modules: list[str]) -> None:
    shape: dict[str, Any] = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    for tied in (False, True):
        model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=1, tie_word_embeddings=tied))
        asked = Lora(rank=2, target_modules=modules)
        if tied:
            with pytest.raises(ConfigError, match="cannot be merged"):
                adapters.fresh(model, asked, 0)
        else:
            adapters.fresh(model, asked, 0)


def test_an_iterate_is_a_peft_folder_over_the_base(base: Path, made: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    assert (made / "iterate-00/base.json").exists() and not (made / "iterate-00/model").exists()
    for k in (1, 2, 3):
        folder = made / f"iterate-{k:02d}/model"
        tokenizer = {p.name for p in base.iterdir()} - {"config.json", "generation_config.json", "model.safetensors"}
        assert {p.name for p in folder.iterdir()} == ADAPTER_FILES | {"stage.json"} | tokenizer
        assert json.loads((folder / "base.json").read_text()) == json.loads((made / "iterate-00/base.json").read_text())
        theirs = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
        batch = collate([[1, 2, 3], [4]], [[5, 6], [7, 8, 9]])
        with torch.no_grad():
            assert torch.equal(sequence_logprobs(theirs, batch), logprobs(folder))
    assert not torch.equal(logprobs(made / "iterate-00"), logprobs(made / "iterate-01/model"))
    said = [{"role": "user", "content": "x"}]
    own, of_base = (AutoTokenizer.from_pretrained(place) for place in (made / "iterate-03/model", base))
    assert own.apply_chat_template(said) == of_base.apply_chat_template(said)
    iterates.forget()


def test_the_adapter_is_cumulative(made: Path) -> None:
    """Iteration t starts from iterate t: its first step has the log-probs of that iterate's table (the self-check), and
    a learning rate of 0 would leave it: one adapter goes on, none is stacked on another."""
    shapes = [{n: w.shape for n, w in _adapter(made, k).items()} for k in (1, 2, 3)]
    assert shapes[0] == shapes[1] == shapes[2] and all(min(shape) == 4 for shape in shapes[0].values())
    for t in range(3):
        found = json.loads((made / f"iterate-{t + 1:02d}/model/selfcheck.json").read_text())
        assert found["largest_gap"] < 1e-5 and abs(found["margin"] - found["expected_margin"]) < 1e-4
    first = [row for row in read_jsonl(made / "metrics.jsonl") if row.get("step") == 1 and "train/loss" in row]
    assert first[0]["train/loss"] == pytest.approx(0.693147, abs=1e-6)


def _adapter(run: Path, k: int) -> dict[str, torch.Tensor]:
    return load_file(run / f"iterate-{k:02d}/model/adapter_model.safetensors")


def test_references_come_from_the_tables_whatever_adapter_is_on(made: Path) -> None:
    """iteration 2's stored references against a plain rescoring with each iterate loaded anew."""
    rows = pq.read_table(made / "iteration-02/pairs.parquet").to_pylist()[:6]
    folders = [made / "iterate-00", *(made / f"iterate-{k:02d}/model" for k in (1, 2))]
    scored = []
    for folder in folders:
        iterates.forget()
        model = iterates.load(folder, FP32).model
        batch = collate([row["prompt_ids"] for row in rows], [row["real_ids"] for row in rows])
        with torch.no_grad():
            scored.append(sequence_logprobs(model, batch))
    mixed = torch.logsumexp(torch.stack(scored), dim=0) - torch.log(torch.tensor(3.0))
    for row, value in zip(rows, mixed.tolist(), strict=True):
        assert row["reference_real_logprob"] == pytest.approx(value, abs=1e-4)
    iterates.forget()


def test_one_base_in_memory_while_iterates_change(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    real = models.from_folder
    monkeypatch.setattr(models, "from_folder", lambda *a, **kwargs: loads.append(a) or real(*a, **kwargs))
    folders = [made / "iterate-00", *(made / f"iterate-{k:02d}/model" for k in (1, 2, 3))]
    iterates.forget()
    first = [logprobs(folder) for folder in folders]
    again = [logprobs(folder) for folder in reversed(folders)]
    assert len(loads) == 1
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(again), strict=True))
    iterates.forget()
    assert torch.equal(first[2], logprobs(folders[2]))  # as from a base on which no other adapter was
    iterates.forget()


@pytest.mark.slow
def test_equal_runs_make_equal_adapters(base: Path, made: Path, command: Command, tmp_path: Path) -> None:
    more = ["regularizer=fictitious_play", "schedule.iterations=1"]
    for name, extra in (("a", []), ("b", ["seed=1"])):
        result = command("train", *words(base, tmp_path / name, *more, *extra))
        assert result.code == 0, result.err
    same, other = (tmp_path / name / "run/iterate-01/model" for name in ("a", "b"))
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (same / file).read_bytes() == (made / "iterate-01/model" / file).read_bytes()
    assert (same / "adapter_model.safetensors").read_bytes() != (other / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
def test_killed_between_two_steps_the_adapter_comes_out_the_same(
    base: Path, made: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["regularizer=fictitious_play", "schedule.iterations=2", "schedule.save_every=1"]
    real, kept = checkpoint.write, []

    def killing(folder: Path, *state: Any, **how: Any) -> None:
        real(folder, *state, **how)
        kept.append(folder)
        if len(kept) == 4:  # the second of the second iteration, whose adapter was not fresh
            raise Killed

    monkeypatch.setattr(checkpoint, "write", killing)
    with pytest.raises(Killed):
        command("train", *words(base, tmp_path, *more))
    assert "iterate-02" in str(kept[-1])
    saved = load_file(next(kept[-1].glob("checkpoint-*/model.safetensors")))
    assert saved.keys() and all("lora_" in name for name in saved)  # of the base nothing is kept
    monkeypatch.undo()
    assert command("train", *words(base, tmp_path, *more)).code == 0
    for k in (1, 2):
        mine, theirs = (run / f"iterate-{k:02d}/model/adapter_model.safetensors" for run in (tmp_path / "run", made))
        assert mine.read_bytes() == theirs.read_bytes()


def test_a_new_adapter_changes_nothing(base: Path) -> None:
    model = models.start(Pretrained(name_or_path=str(base))).model
    batch = collate([[1, 2, 3]], [[5, 6]])
    with torch.no_grad():
        before = sequence_logprobs(model, batch)
        adapted = adapters.fresh(model, Lora(rank=4), seed=0)
        assert torch.equal(before, sequence_logprobs(adapted, batch))
        assert torch.equal(before, sequence_logprobs(adapters.take_off(adapted), batch))


def test_the_estimate_counts_the_adapter(base: Path, made: Path) -> None:
    for modules in ("all-linear", ["q_proj", "down_proj"]):
        spec = Pretrained(name_or_path=str(base), lora=Lora(rank=4, target_modules=modules))
        adapted = adapters.fresh(models.start(spec).model, spec.lora, seed=0)
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        assert sizes.trained_parameters(spec) == trained
    assert sizes.parameters(spec) == sum(w.numel() for w in load_file(base / "model.safetensors").values())


@pytest.mark.slow
def test_sft_can_make_the_first_adapter(base: Path, command: Command, tmp_path: Path) -> None:
    more = ["model.sft.epochs=1", "model.sft.learning_rate=1e-2", "schedule.iterations=1"]
    result = command("train", *words(base, tmp_path, *more))
    assert result.code == 0, result.err
    zero, one = (tmp_path / f"run/iterate-{k:02d}/model" for k in (0, 1))
    assert (zero / "adapter_model.safetensors").exists() and not (zero / "model.safetensors").exists()
    assert load_file(zero / "adapter_model.safetensors").keys() == load_file(one / "adapter_model.safetensors").keys()


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("model.lora.alpha=3", "without an adapter"),
        ("model.lora.target_modules=[nothing_like_it]", "model.lora.target_modules"),
        ("model.lora.target_modules=q_proj", "all-linear, or a list"),
        ("model.lora.rank=-1", "model.lora.rank=-1"),
    ],
)
def test_settings_that_do_nothing_or_cannot_be(
    word: str, named: str, base: Path, command: Command, tmp_path: Path
) -> None:
    rank = ["model.lora.rank=0"] if "alpha" in word else []
    given = [w for w in words(base, tmp_path) if w.partition("=")[0] not in {"model.lora.rank"} or not rank]
    given = [w for w in given if w.partition("=")[0] != word.partition("=")[0]]
    result = command("train", *given, *rank, word)
    assert result.code == 2 and named in result.err, result.err


def test_a_missing_package_is_told_at_once(
    base: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spin_reg import config

    monkeypatch.setattr(config, "find_spec", lambda name: None)
    result = command("train", *words(base, tmp_path / "o"))
    assert result.code == 2 and "pip install spin-reg[lora]" in result.err and not (tmp_path / "o").exists()


def test_a_pickle_beside_the_adapter_is_never_opened(made: Path, tmp_path: Path) -> None:
    import shutil

    from spin_reg.errors import DamagedError

    copy = tmp_path / "model"
    shutil.copytree(made / "iterate-01/model", copy)
    (copy / "adapter_model.safetensors").rename(copy / "adapter_model.bin")
    with pytest.raises(DamagedError, match="cannot be read"):
        iterates.load(copy, FP32)
    iterates.forget()


def test_another_road_to_the_same_references(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["verify.py", str(made), "--rows", "8"])
    runpy.run_path(str(ROOT / "scripts" / "verify.py"), run_name="__main__")
    assert capsys.readouterr().out.count("reference off") == 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_base(kind: str, base: Path, command: Command, tmp_path: Path) -> None:
    """Its arithmetic is coarse and depends on the batch, like bfloat16's; the self-checks hold what is allowed."""
    pytest.importorskip("bitsandbytes", reason="the extra qlora is not installed")
    result = command("train", *words(base, tmp_path, f"model.lora.quantize={kind}"))
    assert result.code == 0, result.err
    run = tmp_path / "run"
    for k in (1, 2):
        assert all(w.dtype == torch.float32 for w in _adapter(run, k).values())
        assert json.loads((run / f"iterate-{k:02d}/model/selfcheck.json").read_text())["tolerance"]["largest"] == 0.1
    result = command("export", str(run), "--to", str(tmp_path / "out"))
    assert result.code == 0, result.err
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_scoring_before_training_leaves_the_gradients_of_a_quantized_base(kind: str, base: Path) -> None:
    """As the self-check does: where the libraries then hold the weights in a form for inference, none would pass."""
    pytest.importorskip("bitsandbytes", reason="the extra qlora is not installed")
    lora = Lora(rank=4, quantize=Quantize(kind))
    batch = collate([[1, 2, 3], [4]], [[5, 6], [7, 8, 9]])
    found = []
    for scores_first in (False, True):
        model = models.start(Pretrained(name_or_path=str(base), lora=lora)).model
        adapted = adapters.fresh(model, lora, seed=0).eval()
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if "lora_B" in name:  # 0 in a new adapter, and so would be the gradients behind it
                    weight.fill_(0.01)
            if scores_first:
                sequence_logprobs(adapted, batch)
        sequence_logprobs(adapted, batch).sum().backward()
        found.append({name: p.grad for name, p in adapted.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        assert gradient is not None and gradient.norm() > 0, name
        assert torch.allclose(found[1][name], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max())), name


def test_a_merged_export_is_the_iterate(made: Path, command: Command, tmp_path: Path) -> None:
    result = command("export", str(made), "--iterate", "2", "--to", str(tmp_path / "out"))
    assert result.code == 0, result.err
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert type(plain).__name__ == "LlamaForCausalLM"
    batch = collate([[1, 2, 3], [4]], [[5, 6], [7, 8, 9]])
    with torch.no_grad():
        found = sequence_logprobs(plain, batch)
    assert torch.allclose(found, logprobs(made / "iterate-02/model"), atol=1e-4)
    assert not torch.allclose(found, logprobs(made / "iterate-00"), atol=1e-4)
    iterates.forget()
    again = command("export", str(made), "--iterate", "2", "--to", str(tmp_path / "out"))
    assert again.code == 2 and "not empty" in again.err


def test_two_adapters_over_one_base_are_compared_over_the_whole_vocabulary(made: Path, tmp_path: Path) -> None:
    """Each model with its own adapter; the values are those of the merged models."""
    inputs = {"data": made / "data", "own": made / "iterate-02/answers/heldout"}
    inputs |= {"model": made / "iterate-02/model", "other": made / "iterate-01/model"}
    found = {}
    for precision in Precision:
        out = tmp_path / precision
        out.mkdir()
        divergence.run(DivergenceSpec(2, 1, 5, FP32, Hardware(precision=precision)), inputs, out, Context())
        found[precision] = pq.read_table(out / "divergences.parquet").column("kl").to_pylist()
    rows = list(divergence.answered(DivergenceSpec(2, 1, 5, FP32, Hardware()), inputs))
    both = [iterates.whole(inputs[role], FP32).model for role in ("model", "other")]
    with torch.no_grad():
        batch = collate([row["prompt_ids"] for row in rows], [row["generated_ids"] for row in rows])
        wanted = token_divergences(*both, batch).sum(1).tolist()
    assert found[Precision.fp32] == pytest.approx(wanted, rel=1e-3, abs=1e-5) and min(wanted) > 1e-3
    assert found[Precision.bf16] == pytest.approx(wanted, rel=0.3, abs=0.02)
