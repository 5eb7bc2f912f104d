"""Models and tokenizers: the tiny one made on the spot, pretrained ones, and the iterates of a run."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from spin_reg import durable, sources
from spin_reg.errors import ConfigError, DamagedError, SpinRegError
from spin_reg.redact import redacted
from spin_reg.settings import Hardware, Model, Precision, Pretrained, Tiny
from spin_reg.specs import Policy

BASE_FILE = "base.json"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def environment(threads: int) -> None:
    """Pin the thread count, on which bits depend, and quiet the libraries."""
    torch.set_num_threads(threads)
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
        max_position_embeddings=sources.TINY_POSITIONS,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation=spec.attn_implementation,
    )
    with torch.random.fork_rng():
        torch.manual_seed(spec.init_seed)
        model = LlamaForCausalLM(config)
    return model.to(_dtype(spec))


def _dtype(spec: Model) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[spec.dtype.value]


def start(spec: Model) -> Loaded:
    """The model a run starts from, before any SFT."""
    tokenizer = load_tokenizer(spec)
    if isinstance(spec, Tiny):
        return _loaded(_tiny(spec, tokenizer), tokenizer)
    assert isinstance(spec, Pretrained)
    folder = sources.model_folder(spec)
    model = _from_folder(folder, spec.dtype.value, spec.attn_implementation, spec.trust_remote_code)
    return _loaded(model, tokenizer)


def load_tokenizer(spec: Model) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, which must have a chat template."""
    if not isinstance(spec, Pretrained):
        return byte_tokenizer()
    folder = sources.model_folder(spec)
    tokenizer = _tokenizer(folder, spec.trust_remote_code)
    if not tokenizer.chat_template:
        raise ConfigError(
            "The model's tokenizer has no chat template.",
            where=f"model.name_or_path={spec.name_or_path}",
            why="prompts are rendered with the model's own template, in sampling and in training alike",
            todo="use a chat model, or save the tokenizer with a chat_template",
        )
    return tokenizer


def _tokenizer(folder: Path, trusted: bool) -> PreTrainedTokenizerBase:
    with _reading(folder):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)


def _from_folder(folder: Path, dtype: str, attn_implementation: str | None, trusted: bool) -> PreTrainedModel:
    kwargs: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with _reading(folder):
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=trusted, **kwargs
        )


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


def _loaded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Loaded:
    return Loaded(model.eval(), tokenizer, end_ids(model.generation_config, tokenizer))


def generation_config(spec: Model) -> GenerationConfig | None:
    """The generation config of a pretrained model, as loading it would find it."""
    if not isinstance(spec, Pretrained):
        return None
    folder = sources.model_folder(spec)
    with _reading(folder):
        if (folder / "generation_config.json").exists():
            return GenerationConfig.from_pretrained(folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
        return GenerationConfig.from_model_config(config)  # as loading the model does


def end_ids(generation_config: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The token ids that end an answer: the generation config's and the tokenizer's."""
    named = getattr(generation_config, "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    found = {i for i in [*listed, tokenizer.eos_token_id] if i is not None}
    if not found:
        raise ConfigError(
            "The model does not say which token ends an answer.",
            where="the model's generation_config.json and tokenizer_config.json",
            why="neither names an eos token, so no answer could end",
            todo="set eos_token in the tokenizer, or eos_token_id in the generation config",
        )
    return tuple(sorted(found))


_held: dict[str, Loaded] = {}  # the one iterate in memory, by folder


def load(folder: Path, policy: Policy, *, exclusive: bool = False) -> Loaded:
    """An iterate of a run; the last one asked for stays in memory.

    Args:
        folder: an iterate's `model/` folder, or a folder whose base.json names the base used as it is.
        exclusive: the caller will change the weights: do not keep them, nor hand out the kept ones.
    """
    key = f"{folder.resolve()} {policy.dtype} {policy.attn_implementation}"
    if exclusive or key not in _held:
        forget()
    if key in _held:
        return _held[key]
    base = folder / BASE_FILE
    trusted = policy.trust_remote_code
    where = _base_folder(base, trusted) if base.exists() else folder
    model = _from_folder(where, policy.dtype, policy.attn_implementation, trusted)
    loaded = _loaded(model, _tokenizer(where, trusted))
    if not exclusive:
        _held[key] = loaded
    return loaded


def forget() -> None:
    """Drop the iterate kept in memory."""
    _held.clear()


def _base_folder(base: Path, trusted: bool) -> Path:
    try:
        saved = json.loads(base.read_bytes())
        model = Pretrained(name_or_path=saved["name"], revision=saved["revision"], trust_remote_code=trusted)
        expected = str(saved["sha256"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(
            "The record of a base model is damaged.",
            where=str(base),
            why=f"it does not say which model was used ({error})",
            todo=f"delete {base.parent} and run the same command: it is made again",
        ) from error
    folder = sources.model_folder(model)
    found = sources.files_sha256(folder, sources.model_files(model))
    if found != expected:
        raise DamagedError(
            "The base model is not the one this run was made with.",
            where=str(folder),
            why=f"its files hash to {found[:12]}, but {base} says {expected[:12]}",
            todo="put the old files back, or begin a run of its own with the new ones",
        )
    return folder


def save(loaded: Loaded, folder: Path) -> None:
    """An ordinary Hugging Face folder: safetensors, configuration, tokenizer with its chat template."""
    with durable.disk_errors(folder):
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)


def accelerator(hardware: Hardware) -> Accelerator:
    """Accelerate's device and precision handling for these settings (its state is one a process)."""
    wanted = "bf16" if hardware.precision is Precision.bf16 else "no"
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != wanted:
        AcceleratorState._reset_state(reset_partial_state=True)
        forget()  # a model kept in memory is wrapped for the other precision
    return Accelerator(mixed_precision=wanted, cpu=not torch.cuda.is_available())
