"""Low-rank adapters (LoRA, arXiv 2106.09685) over a frozen base: an iterate is the base and one cumulative adapter.

An adapter adds (alpha / rank) * B A x to the output of a linear layer; B begins at 0, so a new adapter changes nothing.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import PreTrainedModel

from spin_reg import durable, sources
from spin_reg.errors import ConfigError
from spin_reg.fingerprint import seed_of
from spin_reg.iterates import ADAPTER
from spin_reg.settings import Lora

WEIGHTS = "adapter_model.safetensors"


def fresh(model: PreTrainedModel, lora: Lora, seed: int) -> PeftModel:
    """Put a new adapter on a base; the base's own weights no longer train. Equal seeds make equal adapters.

    Raises:
        ConfigError: the base has no layers of the names in `model.lora.target_modules`; or one that shares its weights.
    """
    modules = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.scale(),
        target_modules=modules,
        lora_dropout=0.0,  # log-probs are compared with ones scored without dropout
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), _fitting(f"model.lora.target_modules={modules}"):
        torch.manual_seed(seed_of("adapter", seed) % 2**63)
        made = get_peft_model(model, settings)
        idle = [] if isinstance(modules, str) else [name for name in modules if not _matches(made, name)]
        if idle:
            raise ValueError(f"no layer is called {' or '.join(idle)}")
    _refuse_tied(made, f"model.lora.target_modules={modules}")
    return made


def _matches(model: PeftModel, name: str) -> bool:
    return any(f".{path}".endswith(f".{name}") for path in model.targeted_module_names)


def _refuse_tied(model: PeftModel, where: str) -> None:
    base: Any = model.get_base_model()
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    bare = [getattr(layer, "base_layer", layer) for layer in ends]
    if bare != ends and bare[0].weight is bare[1].weight:
        raise ConfigError(
            "This adapter cannot be merged.",
            where=where,
            why="the base's input embeddings and its output layer are one matrix, so that merging would change both",
            todo="leave them out: model.lora.target_modules=all-linear takes all other linear layers",
        )


def put_on(model: PreTrainedModel, folder: Path, *, trainable: bool) -> PeftModel:
    """Put the adapter of an iterate's folder on its base; from safetensors alone (PEFT would fall back on a pickle)."""
    if not (folder / WEIGHTS).is_file():
        raise sources.unreadable_weights(folder / WEIGHTS, FileNotFoundError("it is missing"))
    with _fitting(str(folder)):
        return PeftModel.from_pretrained(model, folder, is_trainable=trainable, use_safetensors=True)


def take_off(model: PeftModel) -> PreTrainedModel:
    """The base without its adapter: bit for bit what it was, in the same object."""
    return model.unload()


def merged(model: PeftModel) -> PreTrainedModel:
    """The base with the adapter added into its weights: an ordinary model."""
    return model.merge_and_unload(safe_merge=True)


def save(model: PeftModel, base: dict[str, Any], folder: Path) -> None:
    """Write an adapter folder as PEFT reads it; equal adapters make equal bytes.

    Args:
        base: the record of the base model (see `models.base_record`).
    """
    settings = model.peft_config["default"].to_dict()
    settings |= {"base_model_name_or_path": base["name"], "revision": base["revision"], "inference_mode": True}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    with durable.disk_errors(folder):
        (folder / ADAPTER).write_text(json.dumps(plain, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        save_file({name: weights[name].contiguous() for name in sorted(weights)}, folder / WEIGHTS, {"format": "pt"})


@contextmanager
def _fitting(where: str) -> Iterator[None]:
    """What PEFT raises on an adapter that does not fit its base, as an error of ours."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)  # PEFT asks for it
            yield
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ConfigError(
            "The adapter does not fit the base model.",
            where=where,
            why=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            todo="give model.lora.target_modules=all-linear, or names of linear layers that the base has",
        ) from error
