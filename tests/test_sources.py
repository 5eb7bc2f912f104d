"""What a model folder and a data path say before anything is loaded; no torch."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import Command

from spin_reg import sizes, sources
from spin_reg.corpora import Jsonl
from spin_reg.errors import ConfigError, DamagedError
from spin_reg.settings import Pretrained, Tiny

GPT2 = {"model_type": "gpt2", "n_positions": 1024, "n_ctx": 1024, "n_embd": 768}


def model(folder: Path, config: Any) -> Pretrained:
    """A folder that passes for a model until its weights are read."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"weights")
    return Pretrained(name_or_path=str(folder))


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GPT2, 1024),
        ({"max_position_embeddings": 2048}, 2048),
        ({"max_position_embeddings": 2048, "rope_scaling": None}, 2048),
        ({"max_position_embeddings": 131072, "rope_scaling": LLAMA3}, 131072),
        ({"max_position_embeddings": 32768, "rope_scaling": YARN}, 131072),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 2.0}}, 8192),
        ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 4096),
        (
            {
                "max_position_embeddings": 131072,
                "original_max_position_embeddings": 4096,
                "rope_scaling": {"type": "longrope"},
            },
            4096,
        ),
        (
            {
                "max_position_embeddings": 2048,
                "rope_parameters": {"full_attention": {"rope_type": "dynamic", "factor": 4.0}},
            },
            2048,
        ),
        ({"text_config": {"max_position_embeddings": 8192}}, 8192),
        ({"model_type": "bloom"}, None),
    ],
    ids=str,
)
def test_the_number_of_positions_stands_in_config_json(config: Any, expected: int | None, tmp_path: Path) -> None:
    assert sizes.positions(model(tmp_path, config)) == expected


@pytest.mark.parametrize("config", ["{", "[]", "\xff", '{"n_positions": "many"}'])
def test_a_config_json_that_cannot_be_read_is_named(config: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        sizes.positions(model(tmp_path, config))
    assert str(tmp_path / "config.json") in raised.value.where


WORDS = ["tracker=none", "model=pretrained", "dataset=jsonl", "dataset.path=x.jsonl"]


@pytest.mark.parametrize("verb", ["train", "plan"])
@pytest.mark.parametrize(
    ("limits", "named"),
    [
        (["max_prompt_tokens=513"], "dataset.max_prompt_tokens=513, dataset.max_response_tokens=512"),
        (["max_response_tokens=513"], "dataset.max_prompt_tokens=512, dataset.max_response_tokens=513"),
        (["max_new_tokens=513"], "dataset.max_prompt_tokens=512, generation.max_new_tokens=513"),
    ],
)
def test_limits_over_the_models_positions_exit_2_and_leave_nothing(
    limits: list[str], named: str, verb: str, command: Command, tmp_path: Path
) -> None:
    folder = model(tmp_path / "base", GPT2)
    (key,) = (f"generation.{word}" if "new" in word else f"dataset.{word}" for word in limits)
    result = command(verb, *WORDS, f"model.name_or_path={folder.name_or_path}", key, f"outputs={tmp_path / 'o'}")
    assert result.code == 2, result.err
    lines = result.err.splitlines()
    assert len(lines) == 4 and named in lines[1] and "1025 tokens" in lines[2] and "1024 positions" in lines[2]
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_limits_that_just_fit_pass_and_the_tiny_model_has_its_own(tmp_path: Path) -> None:
    from spin_reg.generation import Generation

    fits = Jsonl(path="x", max_prompt_tokens=512, max_response_tokens=512)
    sizes.check_positions(model(tmp_path, GPT2), fits, Generation(max_new_tokens=256))
    sizes.check_positions(model(tmp_path, {}), Jsonl(path="x", max_prompt_tokens=10**6), Generation())
    sizes.check_positions(Tiny(), fits, Generation(max_new_tokens=3584))
    with pytest.raises(ConfigError, match="may not fit"):
        sizes.check_positions(Tiny(), fits, Generation(max_new_tokens=3585))


def test_a_base_is_read_once_a_process_and_again_where_it_may_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, weights = model(tmp_path, GPT2), tmp_path / "model.safetensors"
    weights.write_bytes(bytes(64))
    whole, read = sources.model_sha256(base), []
    once = sources.file_sha256
    monkeypatch.setattr(sources, "file_sha256", lambda path: [read.append(path.name), once(path)][1])
    for _ in range(3):
        assert sources.checked_folder(base, whole, "") == tmp_path
    assert sorted(read) == ["config.json", "model.safetensors"]
    before = weights.stat()
    weights.write_bytes(bytes(63) + b"1")  # as many bytes, and the times that can be set as they were
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    for _ in range(2):  # what was found damaged once is not taken for whole after that
        with pytest.raises(DamagedError, match="is not the one"):
            sources.checked_folder(base, whole, "")
