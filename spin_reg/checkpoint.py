"""Training state on disk: weights and optimizer as safetensors, the rest as JSON; no pickle."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from spin_reg import durable
from spin_reg.fingerprint import file_sha256

STATE = "state.json"


def _flatten(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Optimizer state as tensors and numbers, keyed `parameter.name`."""
    tensors, numbers = {}, {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value.contiguous()
            else:
                numbers[f"{index}.{name}"] = value
    return tensors, numbers


def write(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, rows: list[dict[str, Any]]
) -> None:
    """Publish the state after `step` as folder/checkpoint-STEP, then drop the older ones."""
    name = f"checkpoint-{step:09d}"
    temporary = folder / f"{name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    tensors, numbers = _flatten(optimizer.state_dict())
    hashes = {}
    for file, content in (("model.safetensors", weights), ("optimizer.safetensors", tensors)):
        durable.write_bytes(temporary / file, save(content))
        hashes[file] = file_sha256(temporary / file)
    state = {"step": step, "numbers": numbers, "rows": rows, "sha256": hashes}
    durable.write_json(temporary / STATE, state)
    older = sorted(folder.glob("checkpoint-?????????"))
    durable.rename_folder(temporary, folder / name)
    for path in older:
        shutil.rmtree(path)


def read(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, list[dict[str, Any]]]:
    """Restore the newest state that verifies; (0, []) where there is none.

    A checkpoint is a cache of work: one that does not verify is passed over, and its steps are done again.
    """
    for path in sorted(folder.glob("checkpoint-?????????"), reverse=True):
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            whole = all(file_sha256(path / file) == sha for file, sha in state["sha256"].items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            whole = False
        if not whole:
            shutil.rmtree(path)
            continue
        _restore(path, state, model, optimizer)
        return int(state["step"]), list(state["rows"])
    return 0, []


def _restore(path: Path, state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    saved = load_file(path / "model.safetensors")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(saved[name])
    entries: dict[int, dict[str, Any]] = {}
    for key, value in [*load_file(path / "optimizer.safetensors").items(), *state["numbers"].items()]:
        index, _, name = key.partition(".")
        entries.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
