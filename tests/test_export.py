"""What `export` writes is what the other tool reads: folders with their cards, pairs, and a push to a Hub of ours."""

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from conftest import SMALL, Command, Result, read_jsonl
from fakehub import FakeHub, files, serving
from huggingface_hub import DatasetCard, ModelCard
from transformers import LlamaConfig, LlamaForCausalLM

from spin_reg import card, hub, models, named, opponents
from spin_reg.opponents import Generator, Iterate, arithmetic, geometric

CHATTY = ["dataset.num_prompts=16", "generation.max_new_tokens=6", "schedule.iterations=1", "schedule.epochs=1"]


@pytest.fixture
def run(swept: tuple[Path, Result]) -> Path:
    (found,) = swept[0].glob("tiny-toy-kl-alpha0.5-seed0-*")
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model whose own card names a licence."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = models.byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=2048, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [x]\n---\n# Base\n")
    return folder


@pytest.fixture(scope="module")
def chats(base: Path, undisturbed: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over conversations of several turns, half of them with a system message."""
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    turns = [[{"role": "system", "content": "be brief"}][: i % 2] for i in range(40)]
    for i, chat in enumerate(turns):
        for j in range(1 + i % 2):
            chat += [{"role": "user", "content": f"q{i}.{j}"}, {"role": "assistant", "content": f"a{i}.{j}"}]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in turns))
    own = [word for word in SMALL if not word.startswith("model.")]
    own += ["model=pretrained", f"model.name_or_path={base}", "dataset=jsonl", f"dataset.path={path}", "run_name=run"]
    return undisturbed(*own, *CHATTY)


def exported(command: Command, root: Path, to: Path, *words: str) -> str:
    result = command("export", str(root), "--to", str(to), *words)
    assert result.code == 0, result.err
    return (to / "README.md").read_text()


def test_the_card_says_what_the_run_was(run: Path, command: Command, tmp_path: Path) -> None:
    text = exported(command, run, tmp_path / "mine", "--iterate", "best", "--by", "heldout_nll", "--license", "mit")
    (tmp_path / "another").touch()  # who may read that may read these
    modes = {path.stat().st_mode for path in (tmp_path / "mine").rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "another").stat().st_mode}
    head = ModelCard(text).data
    assert (head.license, head.library_name, head.pipeline_tag) == ("mit", "transformers", "text-generation")
    assert head.base_model is None and "kl" in head.tags
    rows = [row for row in read_jsonl(run / "metrics.jsonl") if "iterate" in row]
    best = min(rows, key=lambda row: row["eval/heldout_nll"])
    shown = rf"\| heldout_nll \| {best['eval/heldout_nll']:.4g} ± {best['eval/heldout_nll_se']:.2g} \|"
    assert re.search(shown, text) and f"Iterate {best['iterate']} of the run `{run.name}`" in text
    assert "| 1 | pi_1 | `1/2 log pi_0(y) + 1/2 log pi_1(y)` | 0.01 | 1 | 2 |" in text
    assert "log(1 + exp(-z))" in text and "schedule.learning_rate: [0.01]" in text


def test_a_base_s_card_gives_the_licence_and_no_path_of_this_machine_is_told(
    chats: Path, base: Path, command: Command, tmp_path: Path
) -> None:
    text = exported(command, chats, tmp_path / "mine")
    assert ModelCard(text).data.license == "mit" and "base's own model card" in text
    settings = json.loads((chats / "run.json").read_text())
    assert settings["sources"]["data"]["sha256"][0] in text and "the local file chats.jsonl" in text
    assert str(base.parent) not in text and str(tmp_path.parent) not in text


def test_a_reference_in_words_is_the_reference() -> None:
    """The formula, computed with the log-probs in the place of its names, is log r."""
    logprobs = {0: -3.0, 1: -2.5, 2: -4.0}
    trees = [
        Iterate(1),
        geometric([(0.3, Iterate(0)), (0.7, Iterate(2))]),
        arithmetic([(1 / 3, Iterate(k)) for k in range(3)]),
        geometric([(0.25, Iterate(0)), (0.75, arithmetic([(0.5, Iterate(1)), (0.5, Iterate(2))]))]),
        arithmetic([(0.5, Iterate(0)), (0.5, geometric([(0.5, Iterate(1)), (0.5, Iterate(2))]))]),
    ]
    for tree in trees:
        text = re.sub(r"log pi_(\d)\(y\)", r"L[\1]", card.log_formula(tree))
        text = re.sub(r"pi_(\d)\(y\)", r"exp(L[\1])", text)
        text = re.sub(r"([\d/.]+) (?=[Lle(])", r"\1*", text)
        value = eval(text, {"L": logprobs, "log": math.log, "exp": math.exp})
        assert value == pytest.approx(opponents.evaluate(tree, logprobs, 0), abs=1e-12), text
    assert "generated answer" in card.log_formula(Generator((0, 1)))


def test_pairs_for_trl_hold_our_ids_and_references(chats: Path, command: Command, tmp_path: Path) -> None:
    from datasets import load_dataset

    text = exported(command, chats, tmp_path / "pairs", "--format", "trl")
    assert "spin-reg" in DatasetCard(text).data.tags
    found = load_dataset(str(tmp_path / "pairs"), split="train", cache_dir=str(tmp_path / "cache"))
    ours = pq.read_table(chats / "iteration-00/pairs.parquet").to_pylist()
    tokenizer = models.byte_tokenizer()
    same = 0
    for row, pair in zip(found, ours, strict=True):
        assert [row["prompt_ids"], row["chosen_ids"]] == [pair["prompt_ids"], pair["real_ids"]]
        assert row["rejected_ids"] == pair["generated_ids"] and row["example_id"] == pair["example_id"]
        assert row["ref_chosen_logps"] == pair["reference_real_logprob"]
        assert row["ref_rejected_logps"] == pair["reference_generated_logprob"]
        assert tokenizer(row["prompt"] + row["chosen"])["input_ids"] == pair["prompt_ids"] + pair["real_ids"]
        end = "" if pair["finish_reason"] == "stop" else tokenizer.eos_token
        whole = tokenizer(row["prompt"] + row["rejected"] + end)["input_ids"]
        same += whole == pair["prompt_ids"] + pair["generated_ids"]
    assert f"{same} of the {len(ours)} rows" in " ".join(text.split())


def test_a_folder_s_name_does_not_bring_back_an_earlier_export(run: Path, command: Command, tmp_path: Path) -> None:
    """`datasets` keeps what it has read; another export under the same name is another data set."""
    from datasets import load_dataset

    for t in (0, 1):
        pairs = tmp_path / str(t) / "pairs"
        pairs.parent.mkdir()
        exported(command, run, pairs, "--format", "trl", "--iteration", str(t))
        found = load_dataset(str(pairs), split="train", cache_dir=str(tmp_path / "cache"))
        ours = pq.read_table(run / f"iteration-0{t}/pairs.parquet").column("reference_generated_logprob").to_pylist()
        assert found["ref_rejected_logps"][:] == ours


def test_pairs_for_spin_hold_whole_conversations(chats: Path, command: Command, tmp_path: Path) -> None:
    from datasets import load_dataset

    exported(command, chats, tmp_path / "pairs", "--format", "spin", "--iteration", "0")
    found = load_dataset(str(tmp_path / "pairs"), split="train", cache_dir=str(tmp_path / "cache"))
    pairs = pq.read_table(chats / "iteration-00/pairs.parquet").to_pylist()
    tokenizer = models.byte_tokenizer()
    assert any(row["real"][0]["role"] == "system" for row in found) and any(len(row["real"]) == 2 for row in found)
    for row, pair in zip(found, pairs, strict=True):
        asked = tokenizer.apply_chat_template(row["real"][:-1], add_generation_prompt=True, tokenize=False)
        assert tokenizer(asked)["input_ids"] == pair["prompt_ids"] and row["generated"][:-1] == row["real"][:-1]
        assert (row["real"][-1]["content"], row["generated"][-1]["content"]) == (pair["real"], pair["generated"])


def test_conversations_are_not_taken_from_data_that_changed(chats: Path, command: Command, tmp_path: Path) -> None:
    path = Path(json.loads((chats / "run.json").read_text())["settings"]["dataset.path"])
    before = path.read_text()
    path.write_text(before.replace("q1", "Q1"))
    try:
        result = command("export", str(chats), "--to", str(tmp_path / "pairs"), "--format", "spin")
        assert result.code == 3 and "not those of the run any more" in result.err
        assert not (tmp_path / "pairs").exists()
        path.unlink()
        result = command("export", str(chats), "--to", str(tmp_path / "pairs"), "--format", "spin")
        assert result.code == 3 and "was not found" in result.err and not (tmp_path / "pairs").exists()
    finally:
        path.write_text(before)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--iterate", "7"], "with their weights: 0, 1, 2"),
        (["--iterate", "newest"], "best, last, base"),
        (["--iterate", "best", "--by", "margin"], "no side of it is better"),
        (["--iterate", "best", "--by", "nothing"], "give one of"),
        (["--by", "heldout_nll"], "only best is by one"),
        (["--iteration", "0"], "--format hf takes an iterate"),
        (["--format", "trl", "--iterate", "1"], "takes an iteration's pairs"),
        (["--format", "trl", "--iteration", "5"], "with their pairs: 0, 1"),
        (["--format", "gguf"], "give one of hf, trl, spin"),
        (["--public"], "nothing is pushed"),
    ],
)
def test_what_cannot_be_exported_is_named_with_what_can(
    words: list[str], said: str, run: Path, command: Command, tmp_path: Path
) -> None:
    result = command("export", str(run), "--to", str(tmp_path / "out"), *words)
    assert result.code == 2 and said in result.err and not (tmp_path / "out").exists()


def test_best_is_the_best_of_those_that_were_measured(run: Path) -> None:
    rows = {row["iterate"]: row for row in read_jsonl(run / "metrics.jsonl") if "iterate" in row}
    for metric, pick in (("kl_off", min), ("heldout_real_logprob", max)):
        wanted = pick(rows, key=lambda k: rows[k][f"eval/{metric}"])
        assert named.iterate(run, "best", metric).k == named.iterate(run, "best", f"eval/{metric}").k == wanted
    assert [named.iterate(run, name).k for name in ("base", "last", "1")] == [0, 2, 1]


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serving(FakeHub()) as fake:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{fake.port}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", f"http://127.0.0.1:{fake.port}")
        hub.forget()
        yield fake


@pytest.mark.parametrize(
    ("words", "kind"), [(["--format", "hf"], "models"), (["--format", "trl", "--public"], "datasets")]
)
def test_what_is_pushed_is_the_folder(
    words: list[str], kind: str, run: Path, command: Command, served: FakeHub, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    push = [*words, "--push-to-hub", "me/mine"]
    monkeypatch.delenv("HF_TOKEN", raising=False)
    refused = command("export", str(run), "--to", str(tmp_path / "out"), *push)
    assert refused.code == 2 and "HF_TOKEN" in refused.err and not (tmp_path / "out").exists()
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 34)
    result = command("export", str(run), "--to", str(tmp_path / "out"), *push)
    assert result.code == 0, result.err
    assert served.newest(f"{kind}/me/mine") == files(tmp_path / "out")
    (made,) = [asked for asked in served.asked if asked.path == "api/repos/create"]
    asked = json.loads(made.body)  # older clients say private, newer ones visibility
    assert (asked.get("private") or asked.get("visibility") == "private") == ("--public" not in words)
    assert made.token and result.out.splitlines()[-1].startswith("http") and "hf_" not in result.out + result.err


def test_a_push_that_fails_leaves_the_folder(
    run: Path, command: Command, served: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 34)
    result = command("export", str(run), "--to", str(tmp_path / "out"), "--push-to-hub", "no/such/name")
    assert result.code == 1 and "hf upload" in result.err and (tmp_path / "out/model.safetensors").exists()
