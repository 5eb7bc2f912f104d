"""Models and tokenizers: the tiny one made on the spot, and pretrained ones from their folders."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from spin_reg import gpus, products, render, sizes, sources, templates
from spin_reg.errors import ConfigError, DamagedError, SpinRegError
from spin_reg.redact import redacted
from spin_reg.settings import Model, Pretrained, Quantize, Tiny
from spin_reg.specs import Policy

log = logging.getLogger(__name__)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def environment(threads: int) -> None:
    """Pin the thread count, on which bits depend, and quiet the libraries."""
    torch.set_num_threads(threads)
    gpus.settle()
    if not torch.cuda.is_available():  # DeepSpeed, which Accelerate imports where it is, would say so on our output
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


@dataclass(frozen=True)
class Loaded:
    """A policy ready to run: its model, its tokenizer, and the token ids that end an answer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    end_ids: tuple[int, ...]


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer with one token a byte and a chat template; it reads any text."""
    vocabulary = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _tiny(spec: Tiny, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A random Llama; equal settings make equal weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=spec.hidden_size,
        intermediate_size=8 * (spec.hidden_size // 3),
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_heads,
        max_position_embeddings=sizes.TINY_POSITIONS,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation=spec.attn_implementation,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.init_seed)
        model = LlamaForCausalLM(config)
    for weight in model.parameters():  # not all of the model: frequencies of positions stay in float32, as when loaded
        weight.data = weight.data.to(_dtype(spec))
    return model


def _dtype(spec: Model) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[spec.dtype.value]


def start(spec: Model, *, as_stored: bool = False) -> Loaded:
    """The model a run starts from, before any SFT; `as_stored`: see `from_folder`."""
    tokenizer = load_tokenizer(spec)
    if isinstance(spec, Tiny):
        return ready(_tiny(spec, tokenizer), tokenizer)
    assert isinstance(spec, Pretrained)
    policy = Policy(spec.dtype, spec.attn_implementation, None, spec.lora.quantize, spec.trust_remote_code)
    return ready(from_folder(sources.model_folder(spec), policy, spec.gguf_file, as_stored=as_stored), tokenizer)


def load_tokenizer(spec: Model) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, which must have a chat template."""
    if not isinstance(spec, Pretrained):
        return byte_tokenizer()
    folder = sources.model_folder(spec, weights=False)
    tokenizer = tokenizer_of(folder, spec.trust_remote_code, spec.gguf_file, **templates.asked(spec))
    if not tokenizer.chat_template:
        raise ConfigError(
            "The model's tokenizer has no chat template.",
            where=f"model.name_or_path={spec.name_or_path}",
            why="prompts are rendered with the model's own template, in sampling and in training alike",
            todo="use a chat model, or give a template: model.chat_template=FILE",
        )
    return tokenizer


def tokenizer_of(
    folder: Path,
    trusted: bool,
    gguf_file: str | None = None,
    *,
    chat_template: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; it renders with `chat_template` in place of its own, given `template_kwargs`."""
    with _reading(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted, **_gguf(gguf_file))
    own = chat_template or tokenizer.chat_template
    if isinstance(own, dict):  # several by name: the one that conversations without tools are rendered with
        own = own.get("default")
    tokenizer.chat_template = templates.given(own, template_kwargs or {}) if own else None
    return tokenizer


def _gguf(name: str | None) -> dict[str, str]:
    return {} if name is None else {"gguf_file": name}


def from_folder(
    folder: Path, policy: Policy, gguf_file: str | None = None, *, as_stored: bool = False
) -> PreTrainedModel:
    """The model of a folder.

    Args:
        as_stored: in the dtype of its files, if they have one: then it takes no memory before it is used, since they
            are mapped; what is to be cast is cast by the caller.
    """
    kwargs: dict[str, Any] = _gguf(gguf_file)
    if policy.attn_implementation is not None:
        kwargs["attn_implementation"] = policy.attn_implementation
    dtype = getattr(torch, policy.dtype.value)
    if policy.quantize is not Quantize.none:
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=policy.quantize is Quantize.nf4,
            load_in_8bit=policy.quantize is Quantize.int8,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    plain = as_stored and gguf_file is None and policy.quantize is Quantize.none
    with _reading(folder):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=plain and _stored(folder) or dtype,
            use_safetensors=True,
            trust_remote_code=policy.trust_remote_code,
            output_loading_info=True,
            **kwargs,
        )
    _refuse_incomplete(folder, info)
    if plain:
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config.dtype = dtype
    if gguf_file is not None:
        _written_out(model)
    if policy.quantize is Quantize.nf4:
        _unpacked(model)
    _keep_capping(model, policy.attn_implementation, folder)
    return model


def _refuse_incomplete(folder: Path, info: Mapping[str, Any]) -> None:
    """Transformers makes up what weights lack, and leaves out what it has no place for.

    Raises:
        DamagedError: some are lacking. The others are named in the log.
    """
    lacking, idle = (sorted(map(str, info.get(key) or ())) for key in ("missing_keys", "unexpected_keys"))
    if lacking:
        raise DamagedError(
            "The weights of a model are incomplete.",
            where=str(folder),
            why=f"{_some(lacking)} would be random: not in its files" + (f", which have {_some(idle)}" if idle else ""),
            todo="use whole weights, under the names that its architecture gives them",
        )
    if idle:
        _tell_once(f"{folder}: its architecture has no place for {_some(idle)}, which are left out")


@cache
def _tell_once(text: str) -> None:
    """A base is loaded again and again."""
    log.warning("%s", text)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _keep_capping(model: PreTrainedModel, asked: str | None, folder: Path) -> None:
    """PyTorch's attention caps no logits, and some releases of transformers use it, silently, where a model caps them.

    Raises:
        ConfigError: it was asked for.
    """
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    if not capped or model.config._attn_implementation != "sdpa":
        return
    if asked is not None:
        raise ConfigError(
            "This attention leaves out what the model does to its logits.",
            where=f"model.attn_implementation={asked}, {folder}",
            why="the model caps attention's logits (attn_logit_softcapping), scaled_dot_product_attention does not",
            todo="use model.attn_implementation=eager, or leave it out",
        )
    model.set_attn_implementation("eager")


def _stored(folder: Path) -> torch.dtype | None:
    """The one dtype of the weights in a folder's files."""
    found = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            found |= {file.get_slice(name).get_dtype() for name in names}
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    return dtypes.get(found.pop()) if len(found) == 1 else None


def _written_out(model: PreTrainedModel) -> None:
    """Transformers calls a model read from GGUF quantized and will not save it, though its weights are plain."""
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False


def _unpacked(model: PreTrainedModel) -> None:
    """Keep 4-bit weights in the form that gradients pass through.

    On some CPUs bitsandbytes packs them at the first forward without gradients, and then, silently, none pass any more.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """What the libraries raise on files that they cannot use, as errors of ours."""
    try:
        yield
    except (SpinRegError, MemoryError, torch.OutOfMemoryError):
        raise
    except SafetensorError as error:
        raise sources.unreadable_weights(folder, error) from error
    except Exception as error:  # a dozen kinds; each means that these files are no model that can be used here
        why = " ".join(redacted(str(error)).split())[:300]
        raise ConfigError(
            "The model cannot be loaded.",
            where=str(folder),
            why=f"{type(error).__name__}: {why}",
            todo="give a folder as save_pretrained writes it, of a kind that the installed transformers knows",
        ) from error


def ready(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Loaded:
    products.quick(model)
    return Loaded(model.eval(), tokenizer, end_ids(model.generation_config, tokenizer))


def generation_config(spec: Model) -> GenerationConfig | None:
    """The generation config of a pretrained model, as loading it would find it."""
    if not isinstance(spec, Pretrained):
        return None
    return generation_config_of(sources.model_folder(spec, weights=False), spec.trust_remote_code, spec.gguf_file)


def generation_config_of(folder: Path, trusted: bool, gguf_file: str | None = None) -> GenerationConfig:
    """The generation config of a model's folder, as loading it would find it."""
    with _reading(folder):
        if gguf_file is None and (folder / "generation_config.json").exists():
            return GenerationConfig.from_pretrained(folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted, **_gguf(gguf_file))
        return GenerationConfig.from_model_config(config)  # as loading the model does


def end_ids(generation_config: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The token ids that end an answer: the generation config's, the tokenizer's and the chat template's own."""
    named = getattr(generation_config, "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    found = {i for i in [*listed, tokenizer.eos_token_id] if i is not None}
    turn = render.end_of_turn(tokenizer, found) if tokenizer.chat_template else None
    found |= set() if turn is None else {turn}
    if not found:
        raise ConfigError(
            "The model does not say which token ends an answer.",
            where="the model's generation_config.json and tokenizer_config.json",
            why="neither names an eos token, and the chat template puts none behind an answer",
            todo="set eos_token in the tokenizer, or eos_token_id in the generation config",
        )
    return tuple(sorted(found))
