"""The training loop: its schedule, its order of rows, its checkpoints."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from faults import Counter, before_calls
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, get_scheduler

from spin_reg import checkpoint, fit, iterates, packing, scorer
from spin_reg.context import Context
from spin_reg.errors import NonFiniteError, NoSpace
from spin_reg.settings import Hardware, LrScheduler, Optimizer, Precision


@pytest.mark.parametrize("kind", list(LrScheduler))
@pytest.mark.parametrize(("total", "warmup_ratio"), [(10, 0.0), (10, 0.1), (23, 0.25), (2, 0.1)])
def test_learning_rates_are_those_of_transformers(kind: LrScheduler, total: int, warmup_ratio: float) -> None:
    import math

    name = "constant_with_warmup" if kind is LrScheduler.constant else kind.value
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    warmup = math.ceil(total * warmup_ratio)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        assert fit.lr_factor(kind, step, total, warmup_ratio) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("kind", list(LrScheduler))
def test_a_single_step_trains(kind: LrScheduler) -> None:
    assert fit.lr_factor(kind, 0, 1, 0.1) == fit.lr_factor(kind, 0, 1, 1.0) == 1.0


def test_every_epoch_sees_every_row_once_in_an_order_of_its_own() -> None:
    names = [f"row {i}" for i in range(10)]
    steps = fit.batches(names, seed=0, iteration=2, epochs=2, size=4)
    assert [len(s) for s in steps] == [4, 4, 2] * 2
    first, second = sum(steps[:3], []), sum(steps[3:], [])
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert fit.batches(names, seed=0, iteration=2, epochs=1, size=4) == steps[:3]
    assert fit.batches(names, seed=1, iteration=2, epochs=1, size=4) != steps[:3]
    assert fit.batches(names, seed=0, iteration=3, epochs=1, size=4) != steps[:3]


def test_the_order_does_not_depend_on_where_a_row_stood() -> None:
    names = [f"row {i}" for i in range(10)]
    backwards = names[::-1]
    one = [[names[i] for i in s] for s in fit.batches(names, seed=0, iteration=0, epochs=1, size=3)]
    two = [[backwards[i] for i in s] for s in fit.batches(backwards, seed=0, iteration=0, epochs=1, size=3)]
    assert one == two


def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=7, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    return LlamaForCausalLM(config)


def steps(m: PreTrainedModel, optimizer: torch.optim.Optimizer, count: int) -> None:
    for i in range(count):
        torch.manual_seed(i)
        ids = torch.randint(0, 7, (2, 5))
        m(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("precision", list(Precision))
def test_what_has_trained_goes_when_nobody_holds_it(precision: Precision, tmp_path: Path) -> None:
    """A circle of references would keep it till garbage is collected, which a full GPU does not wait for."""
    group = packing.Group([1, 2], ([3, 4],))
    task = fit.Task(lambda scorer, rows: (-scorer([group]).sum(), {}), lambda rows: 1.0, str, lambda i: 3)
    spec = fit.FitSpec(1e-2, Optimizer.adamw, LrScheduler.constant, 0.0, 0.0, 1.0, 64, None, False, 9, 0)

    def trained() -> "weakref.ref[PreTrainedModel]":
        made, accelerator = model(), iterates.accelerator(Hardware(precision=precision))
        how = {"spec": spec, "prefix": "train", "accelerator": accelerator, "out": tmp_path, "context": Context()}
        assert len(fit.fit(made, [[0], [0]], task, **how)) == 2  # type: ignore[arg-type]
        return weakref.ref(made)

    gc.disable()
    try:
        assert trained()() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.RMSprop])
def test_a_checkpoint_restores_weights_and_optimizer_exactly(kind: type[torch.optim.Optimizer], tmp_path: Path) -> None:
    straight = model()
    optimizer = kind(straight.parameters(), lr=1e-2)  # type: ignore[call-arg]
    steps(straight, optimizer, 3)
    checkpoint.write(tmp_path, straight, optimizer, [{"step": i} for i in (1, 2, 3)])
    restored = model()
    other = kind(restored.parameters(), lr=1e-2)  # type: ignore[call-arg]
    assert checkpoint.read(tmp_path, restored, other) == [{"step": i} for i in (1, 2, 3)]
    steps(straight, optimizer, 2)
    steps(restored, other, 2)
    for a, b in zip(straight.parameters(), restored.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_never_used(file: str, tmp_path: Path) -> None:
    m = model()
    optimizer = torch.optim.AdamW(m.parameters())
    steps(m, optimizer, 1)
    checkpoint.write(tmp_path, m, optimizer, [{}])
    path = tmp_path / "checkpoint-000000001" / file
    path.write_bytes(path.read_bytes()[:-3])
    fresh = model()
    assert checkpoint.read(tmp_path, fresh, torch.optim.AdamW(fresh.parameters())) == []
    for a, b in zip(fresh.parameters(), model().parameters(), strict=True):
        assert torch.equal(a, b)


def test_half_a_checkpoint_does_not_stay(tmp_path: Path) -> None:
    m = model()
    optimizer = torch.optim.AdamW(m.parameters())
    steps(m, optimizer, 1)
    with before_calls(Counter(at=4, fault="ENOSPC")), pytest.raises(NoSpace):
        checkpoint.write(tmp_path, m, optimizer, [{}])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "checkpoint-000000007.tmp").mkdir()
    assert checkpoint.read(tmp_path, m, optimizer) == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_finite_number_is_found_wherever_it_is(value: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(37, 29).to(dtype)
    checkpoint.refuse_nonfinite(layer, "here")
    for i in range(layer.weight.numel()):
        before = layer.weight.detach().clone()
        layer.weight.data.view(-1)[i] = value
        with pytest.raises(NonFiniteError, match="parameter weight"):
            checkpoint.refuse_nonfinite(layer, "here")
        layer.weight.data = before
    layer.weight.data[:] = torch.finfo(dtype).max  # whose sum is not finite
    checkpoint.refuse_nonfinite(layer, "here")
    checkpoint.refuse_nonfinite(torch.nn.ParameterList([torch.empty(0)]), "here")  # as a rank that has no part of it


def test_no_variable_of_the_environment_divides_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    weight = torch.ones(1, requires_grad=True)
    iterates.accelerator(Hardware()).backward(3 * weight.sum())
    assert weight.grad is not None and weight.grad.item() == 3


def test_only_the_newest_checkpoint_is_kept(tmp_path: Path) -> None:
    m = model()
    optimizer = torch.optim.AdamW(m.parameters())
    for i in (1, 2):
        steps(m, optimizer, 1)
        checkpoint.write(tmp_path, m, optimizer, [{}] * i)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-000000002"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_computes_a_layer_twice(checkpointing: bool, tmp_path: Path) -> None:
    m = model()
    calls = [0]

    def count(*args: object) -> None:
        calls[0] += 1

    accelerator = iterates.accelerator(Hardware())
    assert scorer.reads_packed(m.to(accelerator.device))  # tried out before it is counted
    m.model.layers[0].mlp.register_forward_pre_hook(count)
    spec = fit.FitSpec(
        learning_rate=1e-3, optimizer=Optimizer.adamw, lr_scheduler=LrScheduler.constant, warmup_ratio=0.0,
        weight_decay=0.0, max_grad_norm=1.0, batch_tokens=64, micro_batch_size=None,
        gradient_checkpointing=checkpointing, save_every=99, iteration=0,
    )  # fmt: skip
    group = [packing.Group([1, 2], ([3, 4], [5]))]
    fit.fit(
        m,
        [[0, 1]] * 3,
        fit.Task(lambda policy, rows: (-policy(group).sum(), {}), weight=lambda rows: 1.0, name=str, slots=lambda i: 5),
        spec=spec,
        prefix="x",
        accelerator=accelerator,
        out=tmp_path,
        context=Context(),
    )
    assert calls[0] == (6 if checkpointing else 3)
