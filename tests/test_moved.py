"""Data and base models that were moved, copied or removed after a run was made from them: their content counts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Command, Result
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from spin_reg import iterates, models
from spin_reg.settings import Dtype
from spin_reg.specs import Policy

SHORT = "dataset.max_response_tokens=6"
OWN = [word for word in SMALL if not word.startswith("model.")]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "here" / "rows.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"prompt": f"q{i}", "response": f"a{i}"}) + "\n" for i in range(40)))
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder, tokenizer = tmp_path / "base", models.byte_tokenizer()
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    LlamaForCausalLM(LlamaConfig(**small, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def words(data: Path, tmp_path: Path) -> list[str]:
    return ["dataset=jsonl", f"dataset.path={data}", f"outputs={tmp_path / 'o'}", "schedule.iterations=1", SHORT]


def done(result: Result) -> str:
    assert result.code == 0, result.err
    return result.out + result.err


def planned(result: Result) -> list[dict[str, Any]]:
    assert result.code == 0, result.err
    stages: list[dict[str, Any]] = json.loads(result.out)["stages"]
    return stages


def manifests(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("stage.json")}


def test_a_run_whose_data_file_is_gone_goes_on(data: Path, words: list[str], command: Command, tmp_path: Path) -> None:
    done(command("train", *SMALL, *words, "run_name=run"))
    run, made = str(tmp_path / "o/run"), manifests(tmp_path / "o/run")
    data.unlink()
    assert "is finished" in done(command("evaluate", run))
    done(command("resume", run, "schedule.iterations=2"))
    done(command("gc", run))
    done(command("export", run, "--to", str(tmp_path / "taken")))
    assert made.items() <= manifests(tmp_path / "o/run").items()
    done(command("resume", run))  # what was looked at stays on record
    (tmp_path / "o/run/data/summary.json").chmod(0o644)
    (tmp_path / "o/run/data/summary.json").write_text("{}")  # damaged: it must be made again, of the file
    lost = command("resume", run)
    assert lost.code == 3 and str(data) in lost.err and "spin-reg resume RUN dataset.path=FILE" in lost.err


def test_a_data_file_that_was_moved_is_told_once(
    data: Path, words: list[str], command: Command, tmp_path: Path
) -> None:
    done(command("train", *SMALL, *words, "run_name=run"))
    run, made = str(tmp_path / "o/run"), manifests(tmp_path / "o/run")
    place = data.rename(tmp_path / "elsewhere.jsonl")
    typo = command("resume", run, f"dataset.path={tmp_path / 'elsewere.jsonl'}")
    assert typo.code == 3 and "elsewere" in typo.err
    out = done(command("resume", run, f"dataset.path={place}"))  # nothing is left to do, and yet it is written down
    assert str(place) in (tmp_path / "o/run/config.yaml").read_text() and "is finished" not in out
    assert "what lies there is the same" in (tmp_path / "o/run/run.log").read_text()
    assert "is finished" in done(command("resume", run)) and manifests(tmp_path / "o/run") == made
    place.write_text(place.read_text() + '{"prompt": "new", "response": "row"}\n')
    for given in [(), (f"dataset.path={shutil.copy(place, tmp_path / 'third.jsonl')}",)]:
        other = command("resume", run, *given)
        assert other.code == 2 and "content of the data: SHA-256" in other.err and ".jsonl" not in other.err


def test_the_same_file_in_another_place_is_the_same_work(
    data: Path, words: list[str], command: Command, tmp_path: Path
) -> None:
    done(command("train", *SMALL, *words))
    copy = shutil.copy(data, tmp_path / "rows.jsonl")
    stages = planned(command("plan", *SMALL, *words, f"dataset.path={copy}", "--json"))
    assert {stage["status"] for stage in stages} == {"reuse"}
    (tmp_path / "rows.jsonl").write_text(data.read_text().replace("a7", "b7"))
    (first, *_) = planned(command("plan", *SMALL, *words, f"dataset.path={copy}", "--json"))
    assert first["status"] == "todo"


@pytest.mark.parametrize("adapted", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["adapter", "whole"])
def test_a_base_that_was_moved_is_told_once(
    adapted: bool, base: Path, words: list[str], command: Command, tmp_path: Path
) -> None:
    rank = ["model.lora.rank=2"] if adapted else []
    own = [*OWN, *words, "model=pretrained", f"model.name_or_path={base}", *rank, "run_name=run"]
    done(command("train", *own))
    run, made = str(tmp_path / "o/run"), manifests(tmp_path / "o/run")
    place = base.rename(tmp_path / "elsewhere")
    iterates.forget()  # as another process, which has no base in memory
    assert "is finished" in done(command("evaluate", run))  # which needs no base
    lost = command("sample", run, "--prompt", "q", "--iterate", "base")
    assert lost.code == 2 and str(base) in lost.err
    assert "spin-reg resume RUN model.name_or_path=FOLDER" in lost.err
    done(command("resume", run, f"model.name_or_path={place}"))
    assert manifests(tmp_path / "o/run") == made
    done(command("sample", run, "--prompt", "q", "--iterate", "base"))
    done(command("resume", run, "schedule.iterations=2", "evaluation.full_kl=true"))
    done(command("export", run, "--to", str(tmp_path / "taken")))
    kept = {path: text for path, text in made.items() if "evaluate" not in path.parts}  # that says more by now
    assert kept.items() <= manifests(tmp_path / "o/run").items()
    iterates.forget()
    weights = models.from_folder(place, Policy(Dtype.float32, None, None))
    with torch.no_grad():
        next(weights.parameters()).add_(1)
    weights.save_pretrained(place)
    other = command("resume", run, "schedule.iterations=3")
    assert other.code == 2 and "files of the model: SHA-256" in other.err


def test_a_template_that_was_moved_is_told_once_and_an_adapter_renders_with_it(
    base: Path, words: list[str], command: Command, tmp_path: Path
) -> None:
    path, said = tmp_path / "mine.jinja", [{"role": "user", "content": "q"}]
    whole = AutoTokenizer.from_pretrained(base).chat_template
    path.write_text(whole + "{# mine #}")
    own = [*OWN, *words, "model=pretrained", f"model.name_or_path={base}", f"model.chat_template={path}"]
    done(command("train", *own, "model.lora.rank=2", "evaluation=none", "run_name=run"))
    run, made = str(tmp_path / "o/run"), manifests(tmp_path / "o/run")
    kept = AutoTokenizer.from_pretrained(tmp_path / "o/run/iterate-01/model")
    assert kept.chat_template.endswith("{# mine #}") and kept.apply_chat_template(said)
    place = path.rename(tmp_path / "yours.jinja")
    assert "is finished" in done(command("resume", run))
    done(command("resume", run, f"model.chat_template={place}"))
    assert str(place) in (tmp_path / "o/run/config.yaml").read_text() and manifests(tmp_path / "o/run") == made
    refused = command("resume", run, "model.chat_template=null")
    assert refused.code == 2 and f'model.chat_template: "{place}" -> null' in refused.err
    place.write_text(whole)
    edited = command("resume", run)
    assert edited.code == 2 and "the model's tokenizer and chat template: SHA-256" in edited.err
