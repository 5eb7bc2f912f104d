"""What sets GPUs apart, as far as a machine without one can show it."""

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Command
from test_sampling import END, llama

from spin_reg import gpus, models, preview, ranks
from spin_reg.decoder import Decoder
from spin_reg.errors import ConfigError
from spin_reg.stages import train as train_stage


def test_no_kernel_that_plans_anew_for_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.set_float32_matmul_precision("high")  # as some containers begin
    models.environment(before)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.get_float32_matmul_precision() == "highest"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_attention_over_a_cache_is_one_kernel_a_layer_there() -> None:
    """On a CPU rows go in blocks, since columns that a block does not see cost time; there a kernel's start does."""
    blocks = {}
    for device in ("cpu", "meta"):
        decoder = Decoder(llama(END + 1), [[1]], 9)
        decoder.mask = torch.empty((40, 90), device=device)
        decoder.rows, decoder.first = [None, *range(39)], [89, *range(39)]
        blocks[device] = decoder._blocks()
    assert blocks["meta"] == ((slice(0, 40), 0),)
    assert [first for _, first in blocks["cpu"]] == [0, 15, 31]
    decoder = Decoder(llama(END + 1), [[1]], 9)
    decoder.mask, decoder.rows = torch.empty((50, 90)), [*range(50)]
    decoder.first = [8] * 16 + [9] * 16 + [1] * 16 + [50] * 2  # blocks that see almost the same columns are one
    assert decoder._blocks() == ((slice(0, 48), 1), (slice(48, 64), 50))
    decoder.first = [48] * 16 + [42] * 16 + [36] * 16 + [30] * 2
    assert decoder._blocks() == ((slice(0, 32), 42), (slice(32, 64), 30))


def test_an_environment_that_sets_cublas_otherwise_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
    text = "you must set an environment variable: CUBLAS_WORKSPACE_CONFIG=:4096:8 or CUBLAS_WORKSPACE_CONFIG=:16:8."
    with pytest.raises(ConfigError, match="same bits") as refused, gpus.repeatable(True, "here"):
        raise RuntimeError(f"{text} For more information, go to the documentation")
    assert "CUBLAS_WORKSPACE_CONFIG=:4096:2:16:8" in refused.value.where
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("wanted", [True, False])
def test_inside_kernels_give_the_same_bits_and_outside_all_is_as_before(wanted: bool) -> None:
    filled = torch.utils.deterministic.fill_uninitialized_memory
    with gpus.repeatable(wanted, "here"):
        assert torch.are_deterministic_algorithms_enabled() == wanted
        assert not torch.is_deterministic_algorithms_warn_only_enabled()  # it would leave attention's backward as it is
        assert torch.utils.deterministic.fill_uninitialized_memory == (filled and not wanted)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory == filled
    with pytest.raises(RuntimeError, match="of another kind"), gpus.repeatable(wanted, "here"):
        raise RuntimeError("of another kind")
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_plan_says_that_the_memory_of_a_gpu_was_not_looked_at(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run that fits the machine's RAM would seem to fit the GPU that it will run on."""
    for there in (False, True):
        monkeypatch.setattr(preview, "GPUS", tmp_path if there else tmp_path / "none")
        (line,) = (line for line in command("plan", *SMALL).out.splitlines() if "memory:" in line)
        assert line.endswith("the memory of the GPU here was not looked at") == there


def test_training_asks_for_them_and_says_what_has_none(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`put_` is among the operations that PyTorch refuses then on every device."""
    terms, asked = train_stage.pair_terms, []

    def putting(*args: Any) -> Any:
        if torch.is_grad_enabled():  # in a step, not in the self-check
            asked.append(torch.are_deterministic_algorithms_enabled())
            torch.zeros(3).put_(torch.tensor([1]), torch.ones(1))
        return terms(*args)

    monkeypatch.setattr(train_stage, "pair_terms", putting)
    words = ["train", *SMALL, "schedule.iterations=1", f"outputs={tmp_path}"]
    refused = command(*words)
    assert refused.code == ConfigError.exit_code and "hardware.deterministic=false" in refused.err
    assert "iteration 0, train" in refused.err and "put_" in refused.err and asked == [True]
    assert command(*words, "hardware.deterministic=false").code == 0
    assert asked[1:] and not any(asked[1:])


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [True, False])
def test_all_that_trains_is_told(
    wanted: bool, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[bool, str]] = []

    def listening(wanted: bool, where: str) -> AbstractContextManager[None]:
        told.append((wanted, where))
        return nullcontext()

    monkeypatch.setattr(gpus, "repeatable", listening)
    words = ["schedule.iterations=1", f"hardware.deterministic={str(wanted).lower()}", f"outputs={tmp_path}"]
    assert command("train", *SMALL, *words).code == 0
    assert [where.split()[-1] for _, where in told] == ["sft", "train"] and {said for said, _ in told} == {wanted}


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, None),
        ({"LOCAL_RANK": "1"}, None),
        (
            {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"},
            "it shows 2 GPUs",
        ),  # the third alone would leave two waiting
        ({"LOCAL_RANK": "2"}, "it shows 2 GPUs"),
        ({}, "a launcher has started it"),
    ],
)
def test_each_rank_has_a_gpu_of_its_own_or_all_are_refused(
    said: dict[str, str], why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    if why is None:
        assert ranks._place(2) == 1
    else:
        with pytest.raises(ConfigError) as refused:
            ranks._place(2)
        assert why in refused.value.why
