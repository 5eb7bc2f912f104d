"""A base in a GGUF file: read, scored, sampled and trained as the same weights in safetensors are (extra `gguf`)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, Command
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from spin_reg import adapters, models, sizes
from spin_reg.settings import Lora, Pretrained

gguf: Any = pytest.importorskip("gguf", reason="the extra gguf is not installed")
pytestmark = pytest.mark.slow
OWN = [word for word in SMALL if not word.startswith("model.")]
OUTSIDE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
INSIDE = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF keeps the rotary halves of a head interleaved."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(path: Path) -> LlamaForCausalLM:
    """A tiny random Llama with a byte-level vocabulary as one GGUF file; the model itself."""
    tokenizer = models.byte_tokenizer()
    tokens = [*(t for t, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])), "th"]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    file = gguf.GGUFWriter(str(path), "llama")
    file.add_context_length(256)
    file.add_embedding_length(32)
    file.add_block_count(2)
    file.add_feed_forward_length(64)
    file.add_head_count(4)
    file.add_head_count_kv(2)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_freq_base(10000.0)
    file.add_rope_dimension_count(8)
    file.add_vocab_size(len(tokens))
    file.add_tokenizer_model("gpt2")
    file.add_token_list(tokens)
    file.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    file.add_token_merges(["t h"])
    file.add_eos_token_id(tokenizer.eos_token_id)
    file.add_pad_token_id(tokenizer.pad_token_id)
    file.add_chat_template(tokenizer.chat_template)
    for name, tensor in model.state_dict().items():
        layer, weight = name.removesuffix(".weight"), tensor.numpy()
        if layer in OUTSIDE:
            file.add_tensor(f"{OUTSIDE[layer]}.weight", weight)
            continue
        _, _, block, inner = layer.split(".", 3)
        heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(inner)
        file.add_tensor(f"blk.{block}.{INSIDE[inner]}.weight", permuted(weight, heads) if heads else weight)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    folder = tmp_path_factory.mktemp("base")
    return folder, write(folder / "tiny.gguf")


def test_the_weights_are_those_of_the_file(base: tuple[Path, LlamaForCausalLM]) -> None:
    folder, model = base
    spec = Pretrained(name_or_path=str(folder), gguf_file="tiny.gguf", lora=Lora(rank=4))
    loaded = models.start(spec)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, model(ids).logits)
    assert sizes.parameters(spec) == sum(p.numel() for p in model.parameters())
    assert sizes.positions(spec) == 256
    adapted = adapters.fresh(loaded.model, spec.lora, seed=0)
    assert sizes.trained_parameters(spec) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_a_run_over_a_gguf_base(rank: int, base: tuple[Path, Any], command: Command, tmp_path: Path) -> None:
    words = [*OWN, "model=pretrained", f"model.name_or_path={base[0]}", "model.gguf_file=tiny.gguf", "run_name=run"]
    words += [f"model.lora.rank={rank}", "schedule.optimizer=adamw", "schedule.epochs=1", f"outputs={tmp_path}"]
    result = command("train", *words)
    assert result.code == 0, result.err
    assert '"gguf_file": "tiny.gguf"' in (tmp_path / "run/iterate-00/base.json").read_text()
    result = command("export", str(tmp_path / "run"), "--to", str(tmp_path / "out"))
    assert result.code == 0, result.err
    assert "quantization_config" not in (tmp_path / "out/config.json").read_text()
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__ == "LlamaForCausalLM"


def test_a_file_that_is_not_there(base: tuple[Path, Any], command: Command, tmp_path: Path) -> None:
    words = [*OWN, "model=pretrained", f"model.name_or_path={base[0]}", "model.gguf_file=other.gguf"]
    result = command("train", *words, f"outputs={tmp_path / 'o'}")
    assert result.code == 2 and "it has no other.gguf" in result.err and not (tmp_path / "o").exists()
