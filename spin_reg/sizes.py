"""How large a model is, from its files' headers and its config.json; without torch, and without reading a weight."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from spin_reg import hub, sources
from spin_reg.corpora import Dataset
from spin_reg.errors import ConfigError
from spin_reg.generation import Generation
from spin_reg.settings import ALL_LINEAR, Model, Pretrained, Tiny

STRETCHING = {"dynamic", "longrope", "su"}  # RoPE whose frequencies depend on the longest row of a batch
OUTER = ("embed", "embd", "lm_head", "wte", "wpe", "norm")  # in the names of what is no linear layer between the two
TINY_POSITIONS, TINY_VOCABULARY = 4096, 261  # of the model made on the spot: 256 bytes and 5 marks

LOGITS_AT_ONCE = 2**24  # 64 MB in float32: what is made at a time to read log-probs off
LOGITS_KEPT = 2**27  # 512 MB: what is kept for the gradient; where there is more, it is made again
KERNELS = 64  # products of different shapes whose kernels a process keeps


def weight_files(model: Pretrained) -> list[Path]:
    """The safetensors files that hold a model's weights; of the Hub some may not be here yet."""
    folder = sources.model_folder(model, weights=False)
    for index in folder.glob("*.safetensors.index.json"):
        return [folder / name for name in sorted(set(sources.json_object(index)["weight_map"].values()))]
    names = {name for name in sources.names(model, folder) if name.endswith(".safetensors")}
    single = {"model.safetensors"} & names
    return [folder / name for name in sorted(single or names)]


def to_download(model: Model) -> int:
    """Bytes of a model's weights that are still on the Hub."""
    if not isinstance(model, Pretrained) or model.gguf_file is not None or not sources.on_hub(model):
        return 0
    missing = [path for path in weight_files(model) if not path.exists()]
    return sum(hub.size(model, path.parent.name, path.name) for path in missing)


def parameters(model: Model) -> int:
    """How many weights an iterate of this model has, from the headers of its files.

    Raises:
        DamagedError: they are no safetensors files.
    """
    if isinstance(model, Tiny):
        h, v = model.hidden_size, TINY_VOCABULARY
        return model.num_layers * (4 * h * h + 3 * h * 8 * (h // 3) + 2 * h) + 2 * v * h + h
    assert isinstance(model, Pretrained)
    return sum(math.prod(shape) for shape in shapes(model).values())


def cast_from(model: Model, width: int) -> int:
    """Bytes of the files that weights of so many bytes are read from, if they have others there; else 0."""
    if not isinstance(model, Pretrained) or model.gguf_file is not None:
        return 0
    folder = sources.model_folder(model, weights=False)
    stored = sum(
        path.stat().st_size if path.exists() else hub.size(model, folder.name, path.name)
        for path in weight_files(model)
    )
    return 0 if 0.75 < stored / (width * parameters(model)) < 1.5 else stored


def of_tokenizer(model: Model) -> int:
    """Bytes of the tokenizer's file, which every iterate has a copy of."""
    if not isinstance(model, Pretrained):
        return 0
    path = sources.model_folder(model, weights=False) / "tokenizer.json"
    return path.stat().st_size if path.exists() else 0


def shapes(model: Pretrained) -> dict[str, list[int]]:
    """The shape of every weight, by name, from the headers of the model's files; a matrix is (out, in).

    Raises:
        DamagedError: they are no safetensors (or no GGUF) files.
    """
    if model.gguf_file is not None:
        return _gguf_shapes(sources.model_folder(model) / model.gguf_file)
    found: dict[str, list[int]] = {}
    for path in weight_files(model):
        if sources.on_hub(model) and not path.exists():
            found |= hub.shapes(model, path.parent.name, path.name)
            continue
        try:
            with safe_open(path, framework="np") as file:
                names = file.keys()
                found |= {name: file.get_slice(name).get_shape() for name in names}
        except (SafetensorError, OSError) as error:
            raise sources.unreadable_weights(path, error) from error
    return found


def _gguf_shapes(path: Path) -> dict[str, list[int]]:
    from gguf import GGUFReader

    try:
        return {t.name: [int(n) for n in reversed(t.shape)] for t in GGUFReader(path).tensors}
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise sources.unreadable_weights(path, error) from error


def trained_parameters(model: Model) -> int:
    """How many weights an iterate keeps of its own: all of them, or (of a GGUF base at most) those of its adapter."""
    if not isinstance(model, Pretrained) or model.lora.rank == 0:
        return parameters(model)
    names = model.lora.target_modules
    total = 0
    for name, shape in shapes(model).items():
        layer = name.removesuffix(".weight").rpartition(".")[2]
        inner = len(shape) == 2 and name != "output.weight" and not any(word in name for word in OUTER)
        if inner if names == ALL_LINEAR or model.gguf_file else layer in names:
            total += model.lora.rank * sum(shape)
    return total


def positions(model: Model) -> int | None:
    """How many tokens a model can read at once, as its files say it; None: no limit."""
    if not isinstance(model, Pretrained):
        return TINY_POSITIONS
    if model.gguf_file is not None:
        return _gguf_positions(sources.model_folder(model) / model.gguf_file)
    path = sources.model_folder(model, weights=False) / "config.json"
    try:
        settings: dict[str, Any] = json.loads(path.read_bytes())
        return positions_of(settings)
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            "The model's config.json cannot be read.",
            where=str(path),
            why=" ".join(str(error).split())[:200],
            todo="put the file back as save_pretrained wrote it",
        ) from error


def positions_of(settings: Mapping[str, Any]) -> int | None:
    """The same of the settings in a config.json, with its RoPE scaling.

    A RoPE that stretches with the length counts up to where that begins: beyond, a log-prob would depend on the batch's
    longest row, and keys that are cached before would not fit those after.
    """
    settings = settings.get("text_config") or settings  # of a model that reads pictures too
    found = settings.get("max_position_embeddings", settings.get("n_positions"))
    if found is None:
        return None
    scaling = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    parts = [part for part in (scaling, *scaling.values()) if isinstance(part, dict)]  # one a kind of layer, or one
    original = scaling.get("original_max_position_embeddings", found)
    if any(part.get("rope_type", part.get("type")) in STRETCHING for part in parts):
        return min(int(found), int(settings.get("original_max_position_embeddings", original)))
    scaled = original * (scaling.get("factor") or 1)
    return max(int(found), int(scaled))


def _gguf_positions(path: Path) -> int | None:
    from gguf import GGUFReader

    try:
        fields = GGUFReader(path).fields
        return next((int(f.contents()) for name, f in fields.items() if name.endswith(".context_length")), None)
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise sources.unreadable_weights(path, error) from error


def check_positions(model: Model, dataset: Dataset, generation: Generation, matched: int | None = None) -> None:
    """A prompt at its limit with an answer at its limit, real or generated, must fit the model's positions.

    Args:
        matched: tokens of an answer that is drawn for exact match, where that has a limit of its own.

    Raises:
        ConfigError: it does not; learned positions would end in an IndexError, rotary ones in worse and worse text.
    """
    room = positions(model)
    answers = {"dataset.max_response_tokens": dataset.max_response_tokens}
    answers["generation.max_new_tokens"] = generation.max_new_tokens or dataset.max_response_tokens
    answers["evaluation.exact_match.max_new_tokens"] = matched or 0
    key = max(answers, key=lambda name: answers[name])
    needed = dataset.max_prompt_tokens + answers[key]
    if room is not None and needed > room:
        raise ConfigError(
            "A prompt and its answer may not fit the model.",
            where=f"dataset.max_prompt_tokens={dataset.max_prompt_tokens}, {key}={answers[key]}",
            why=f"they may have {needed} tokens together, and {room} positions can be used (fewer than "
            "the model has where its RoPE stretches with the length)",
            todo="lower one of these two limits, or choose a model with more positions",
        )


@dataclass(frozen=True)
class Shape:
    """The widths that memory hangs on; `cached` is the width of a layer's keys (and of its values)."""

    layers: int
    hidden: int
    inner: int
    cached: int
    vocabulary: int


def shape(model: Model) -> Shape | None:
    """A model's widths as its config.json says them; None where it says them in words of its own."""
    if isinstance(model, Tiny):
        h = model.hidden_size
        return Shape(model.num_layers, h, 8 * (h // 3), h, TINY_VOCABULARY)
    assert isinstance(model, Pretrained)
    if model.gguf_file is not None:
        return None
    found = sources.json_object(sources.model_folder(model, weights=False) / "config.json")
    found = found.get("text_config") or found
    try:
        layers, hidden = found.get("num_hidden_layers") or found["n_layer"], found.get("hidden_size") or found["n_embd"]
        heads = found.get("num_attention_heads") or found["n_head"]
        width = found.get("head_dim") or hidden // heads
        inner = found.get("intermediate_size") or found.get("n_inner") or 4 * hidden
        cached = (found.get("num_key_value_heads") or heads) * width
        return Shape(int(layers), int(hidden), int(inner), int(cached), int(found["vocab_size"]))
    except (KeyError, TypeError, ValueError):
        return None
