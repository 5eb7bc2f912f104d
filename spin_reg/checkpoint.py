"""Training state on disk: weights and optimizer as safetensors, the rest as JSON; no pickle."""

import logging
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from spin_reg import durable, ranks, sharing
from spin_reg.errors import NonFiniteError, SpinRegError
from spin_reg.fingerprint import file_sha256

STATE, MODEL, OPTIMIZER = "state.json", "model.safetensors", "optimizer.safetensors"
log = logging.getLogger(__name__)


class Optimizer(Protocol):
    """What is asked of one, torch's or another that speaks as torch's does."""

    param_groups: list[dict[str, Any]]

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> None: ...


def _flatten(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Optimizer state as tensors and numbers, keyed `parameter.name`."""
    tensors, numbers = {}, {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = sharing.on_main(value)
            else:
                numbers[f"{index}.{name}"] = value
    return tensors, numbers


def write(
    folder: Path, model: nn.Module, optimizer: Optimizer, rows: list[dict[str, Any]], *, together: bool = False
) -> None:
    """Publish the state after as many steps as there are metrics rows, then drop the older ones. Ranks that train
    together all call this, and the main one writes.

    Args:
        together: weights or the optimizer are laid across the ranks, and are put together; each waits for the end.

    Raises:
        NonFiniteError: a weight is NaN or infinite; the older checkpoint stays.
    """
    refuse_nonfinite(model, f"step {len(rows)}")
    name = f"checkpoint-{len(rows):09d}"
    target, temporary = folder / name, folder / f"{name}.tmp"
    there = target.exists()  # on a disk that several machines share not all may see it yet
    if ranks.from_main(there) if together else there:
        return  # equal steps make equal states
    weights = {n: sharing.on_main(p.detach()) for n, p in model.named_parameters() if p.requires_grad}
    tensors, numbers = _flatten(optimizer.state_dict())
    if ranks.is_main():
        _clear(folder)
        try:
            _write(temporary, weights, tensors, numbers, rows)
            older = sorted(folder.glob("checkpoint-?????????"))
            durable.rename_folder(temporary, target)
        except SpinRegError:
            _clear(folder)  # on a full disk half a checkpoint is in the way
            raise
        for path in older:
            durable.remove(path)
    if together:
        ranks.wait()  # not in a collective of the next step, which would not wait as long as a disk may take


def _clear(folder: Path) -> None:
    """Remove the checkpoints that were not finished."""
    for path in folder.glob("checkpoint-*.tmp"):
        durable.remove(path)


def _write(
    temporary: Path,
    weights: dict[str, Tensor],
    tensors: dict[str, Tensor],
    numbers: dict[str, float],
    rows: list[dict[str, Any]],
) -> None:
    durable.make_folder(temporary)
    hashes = {}
    for file, content in ((MODEL, weights), (OPTIMIZER, tensors)):
        durable.write_bytes(temporary / file, save(content))
        hashes[file] = file_sha256(temporary / file)
    durable.write_record(temporary / STATE, {"numbers": numbers, "rows": rows, "sha256": hashes})


def refuse_nonfinite(model: nn.Module, where: str) -> None:
    """Raise NonFiniteError if a weight that trains is NaN or infinite."""

    def check() -> None:
        for name, p in model.named_parameters():
            if p.requires_grad and not _finite(sharing.own(p)):
                raise NonFiniteError(
                    "A weight is not a finite number.",
                    where=f"{where}, parameter {name}",
                    why="the last update spoilt the policy, so it is not kept",
                    todo="lower schedule.learning_rate, or use hardware.precision=fp32",
                )

    if any(sharing.sharded(p) for p in model.parameters()):
        sharing.agreed(check)
    else:
        check()  # all ranks have the same weights


def _finite(tensor: Tensor) -> bool:
    """Whether all are finite: then the least and the greatest are (NaN is either). `isfinite` of each takes tenfold."""
    return tensor.numel() == 0 or bool(torch.stack(tensor.detach().aminmax()).isfinite().all())


def read(folder: Path, model: nn.Module, optimizer: Optimizer) -> list[dict[str, Any]]:
    """Restore the newest state that verifies and return its metrics, a row a step; none where there is no such state.

    A checkpoint is a cache of work: one that does not verify is named in the log, and its steps are done again. Any
    number of ranks may go on from it, whatever number wrote it; the main one looks at what is there.
    """
    found = ranks.from_main(_newest(folder) if ranks.is_main() else None)
    if found is None:
        return []
    path = folder / found
    state = durable.read_record(path / STATE)
    _restore(path, state, model, optimizer)
    return list(state["rows"])


def _newest(folder: Path) -> str | None:
    """The name of the newest checkpoint that verifies; those that do not, and what was not finished, are removed."""
    _clear(folder)
    for path in sorted(folder.glob("checkpoint-?????????"), reverse=True):
        try:
            state = durable.read_record(path / STATE)
            if not isinstance(state["rows"], list) or not isinstance(state["numbers"], dict):
                raise ValueError("its fields are not what is written there")
            damaged = [file for file in (MODEL, OPTIMIZER) if file_sha256(path / file) != state["sha256"].get(file)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s is damaged (%s): its steps are done again", path / STATE, error)
        else:
            if not damaged:
                return path.name
            log.warning("%s is damaged: its steps are done again", path / damaged[0])
        durable.remove(path)
    return None


def _restore(path: Path, state: dict[str, Any], model: nn.Module, optimizer: Optimizer) -> None:
    saved = load_file(path / MODEL)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(sharing.like(p, saved[name]))
    entries: dict[int, dict[str, Any]] = {}
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for key, value in [*sorted(load_file(path / OPTIMIZER).items()), *state["numbers"].items()]:
        index, _, name = key.partition(".")
        laid = sharing.like(trained[int(index)], value) if isinstance(value, Tensor) else value
        entries.setdefault(int(index), {})[name] = laid
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
