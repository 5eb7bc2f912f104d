"""The iterates of a run: read, kept in memory while they are used, and written."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spin_reg import durable, models, sources, templates
from spin_reg.errors import DamagedError
from spin_reg.fingerprint import file_sha256
from spin_reg.models import Loaded
from spin_reg.settings import Hardware, Lora, Precision, Pretrained
from spin_reg.specs import BenchmarkSpec, Policy

BASE_FILE, ADAPTER = "base.json", "adapter_config.json"
_held: dict[str, Loaded] = {}  # the one model in memory, by what its weights are; an adapter may be on it
_worn: list[PreTrainedModel] = []  # that model with its adapter


def load(
    folder: Path,
    policy: Policy,
    *,
    exclusive: bool = False,
    fresh: tuple[Lora, int] | None = None,
    as_stored: bool = False,
) -> Loaded:
    """An iterate of a run. The last model asked for stays in memory; iterates that are adapters share their base.

    Args:
        folder: an iterate's `model/` folder; or one whose base.json names a base, used as it is or under an adapter.
        exclusive: the caller will change the weights: do not keep them, nor hand out the kept ones. An adapter trains.
        fresh: the adapter (and its seed) to put on a base that has none yet.
        as_stored: of one that is `exclusive`; see `models.from_folder`.
    """
    record = folder / BASE_FILE
    adapted = (folder / ADAPTER).exists()
    key = f"{file_sha256(record) if record.exists() else folder.resolve()} {policy}"
    if exclusive or key not in _held:
        forget()
    if key not in _held:
        _held[key] = _from_iterate(folder, policy, as_stored)
    loaded = _held[key]
    if adapted or fresh or _worn:
        from spin_reg import adapters

        if _worn:
            adapters.take_off(_worn.pop())
        if adapted:
            model = adapters.put_on(loaded.model, folder, trainable=exclusive)
        elif fresh:
            model = adapters.fresh(loaded.model, *fresh)
        if adapted or fresh:
            _worn.append(model)
            loaded = replace(loaded, model=model.eval())
    if exclusive:
        forget()
    else:
        # Kernels, and so bits, hang on this even where no gradient is asked for; and only of what requires one does
        # autocast keep what it has cast.
        for weight in loaded.model.parameters():
            weight.requires_grad_(weight.is_floating_point())
    return loaded


def whole(folder: Path, policy: Policy) -> Loaded:
    """An iterate as one ordinary model: its adapter, if it has one, merged into the base."""
    loaded = load(folder, policy, exclusive=True)
    if (folder / ADAPTER).exists():
        from spin_reg import adapters

        loaded = replace(loaded, model=adapters.merged(loaded.model))
    return loaded


def forget() -> None:
    """Drop the model kept in memory."""
    _held.clear()
    _worn.clear()


def make_room() -> None:
    """Drop the model kept in memory, and give back what of a GPU's is free: another process wants it."""
    forget()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _from_iterate(folder: Path, policy: Policy, as_stored: bool) -> Loaded:
    """The model of an iterate's folder, or the base that its base.json names, without an adapter."""
    where, gguf_file, renders = _files(folder, policy)
    tokenizer = models.tokenizer_of(where, policy.trust_remote_code, gguf_file, **renders)
    return models.ready(models.from_folder(where, policy, gguf_file, as_stored=as_stored), tokenizer)


def _files(folder: Path, policy: Policy) -> tuple[Path, str | None, dict[str, Any]]:
    """Where an iterate's model lies, or its base's, the GGUF file there if it is one, and how its tokenizer renders."""
    if not (folder / BASE_FILE).exists():
        return folder, None, {}
    where, saved = _base_folder(folder / BASE_FILE, policy)
    renders: dict[str, Any] = {key: saved[key] for key in ("chat_template", "template_kwargs") if key in saved}
    return where, saved.get("gguf_file"), renders


def reader(folder: Path, policy: Policy) -> tuple[PreTrainedTokenizerBase, tuple[int, ...]]:
    """The tokenizer of an iterate, and the token ids that end an answer, as `load` gives them, without the weights."""
    where, gguf_file, renders = _files(folder, policy)
    tokenizer = models.tokenizer_of(where, policy.trust_remote_code, gguf_file, **renders)
    named = models.generation_config_of(where, policy.trust_remote_code, gguf_file)
    return tokenizer, models.end_ids(named, tokenizer)


def for_others(folder: Path, policy: Policy | BenchmarkSpec, *, tokenizer: Path | None) -> dict[str, str]:
    """Where another program finds an iterate's weights: `pretrained`, and `peft` or `gguf_file` where it has those.

    Args:
        tokenizer: where a tokenizer may be written that renders as the run's own does, which the base's may not; None:
            nothing will be rendered.
    """
    if not (folder / BASE_FILE).exists():
        return {"pretrained": str(folder.absolute())}
    where, saved = _base_folder(folder / BASE_FILE, policy)
    found = {"pretrained": str(where.absolute())} | (
        {"peft": str(folder.absolute())} if (folder / ADAPTER).exists() else {}
    )
    found |= {"gguf_file": saved["gguf_file"]} if "gguf_file" in saved else {}
    renders = {key: saved[key] for key in ("chat_template", "template_kwargs") if key in saved}
    if renders and tokenizer is not None:
        durable.make_folder(tokenizer)
        own = models.tokenizer_of(where, policy.trust_remote_code, saved.get("gguf_file"), **renders)
        own.save_pretrained(tokenizer / "tokenizer")
        found["tokenizer"] = str(tokenizer / "tokenizer")
    return found


def base_record(spec: Pretrained, sha256: str | None) -> dict[str, Any]:
    """What names a base, and tells whether it is still the same: name, revision, GGUF file, SHA-256 of its files.

    And how its tokenizer renders where that is not as its files say (see `templates.asked`).
    """
    found = {"name": spec.name_or_path, "revision": sources.model_revision(spec), "sha256": sha256}
    found |= {} if spec.gguf_file is None else {"gguf_file": spec.gguf_file}
    return found | templates.asked(spec)


def base_of(folder: Path) -> dict[str, Any]:
    """The record of the base that an iterate's folder is made over."""
    record: dict[str, Any] = json.loads((folder / BASE_FILE).read_bytes())
    return record


def _base_folder(base: Path, policy: Policy | BenchmarkSpec) -> tuple[Path, dict[str, Any]]:
    """The base's folder, where the settings have it by now, found to be the same as ever; and its record."""
    try:
        saved = json.loads(base.read_bytes())
        model = Pretrained(
            name_or_path=saved["name"] if policy.base is None else policy.base,
            revision=saved["revision"],
            gguf_file=saved.get("gguf_file"),
            trust_remote_code=policy.trust_remote_code,
        )
        expected = str(saved["sha256"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(
            "The record of a base model is damaged.",
            where=str(base),
            why=f"it does not say which model was used ({error})",
            todo=f"delete {base.parent} and run the same command: it is made again",
        ) from error
    return sources.checked_folder(model, expected, str(base)), saved


def save(loaded: Loaded, folder: Path, base: dict[str, Any] | None = None) -> None:
    """An ordinary Hugging Face folder: safetensors, configuration, tokenizer with its chat template.

    With the record of a `base`: a PEFT folder with the adapter alone, the tokenizer, and that record.
    """
    if base is not None:
        from spin_reg import adapters

        adapters.save(loaded.model, base, folder)
        durable.write_json(folder / BASE_FILE, base)
    with durable.disk_errors(folder):
        if base is None:
            loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)  # beside an adapter too: the base's own may render otherwise


def accelerator(hardware: Hardware) -> Accelerator:
    """Accelerate's device and precision handling for these settings (its state is one a process)."""
    wanted = "bf16" if hardware.precision is Precision.bf16 else "no"
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != wanted:
        AcceleratorState._reset_state(reset_partial_state=True)
        forget()  # a model kept in memory is wrapped for the other precision
    once = GradientAccumulationPlugin(num_steps=1)  # else a variable of the environment would divide gradients
    return Accelerator(mixed_precision=wanted, cpu=not torch.cuda.is_available(), gradient_accumulation_plugin=once)
