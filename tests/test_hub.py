"""A model of the Hub is known, sized and vetted before its weights are downloaded; the real clients, a Hub of ours."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from conftest import Result
from fakehub import FakeHub, Files, files, header, serving
from huggingface_hub.errors import OfflineModeIsEnabled
from transformers import LlamaConfig, LlamaForCausalLM

from spin_reg import hub, models, sizes, sources
from spin_reg.errors import ConfigError
from spin_reg.settings import Lora, Pretrained

CHATS = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}] for i in range(40)]
ROWS = "".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS).encode()
OWN = ["tracker=none", "model=pretrained", "model.name_or_path=somebody/small", "dataset=hub", "dataset.num_prompts=16"]
OWN += ["dataset.path=somebody/chats", "dataset.num_heldout=8", "generation.max_new_tokens=4", "schedule.batch_size=8"]
OWN += ["hardware.threads=1", "schedule.optimizer=adamw", "schedule.iterations=1", "evaluation=none", "run_name=run"]
SMALL, CHAT = "models/somebody/small", "datasets/somebody/chats"


def model_files(folder: Path, seed: int, **save: str) -> Files:
    """A model small enough to be served, in one file or several."""
    import torch

    tokenizer = models.byte_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=4096, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder, **save)
    tokenizer.save_pretrained(folder)
    return files(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return model_files(tmp_path_factory.mktemp("small"), 0)


@pytest.fixture
def served(small: Files) -> Iterator[FakeHub]:
    fake = FakeHub()
    fake.push(SMALL, small)
    fake.push(CHAT, {"README.md": b"# Chats\n", "data/train-00000.jsonl": ROWS})
    with serving(fake):
        yield fake


@pytest.fixture
def here(served: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """This process asks the fake Hub."""
    address = f"http://127.0.0.1:{served.port}"
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    hub.forget()
    yield served
    hub.forget()


NAMED = Pretrained(name_or_path="somebody/small")


@pytest.mark.parametrize("case", ["one file", "shards", "weights in git", "more than is read"])
def test_a_model_is_the_same_before_and_after_its_weights_are_downloaded(
    case: str, here: FakeHub, small: Files, tmp_path: Path
) -> None:
    content = model_files(tmp_path / "shards", 0, max_shard_size="8KB") if case == "shards" else dict(small)
    if case == "weights in git":
        here.in_git.add("model.safetensors")
    if case == "more than is read":
        content |= {
            "pytorch_model.bin": b"x",
            "README.md": b"x",
            "onnx/model.safetensors": b"x",
            "a/config.json": b"{}",
        }
    here.push(SMALL, content)
    before = sources.model_sha256(NAMED), sources.tokenizer_sha256(NAMED), sizes.parameters(NAMED)
    assert here.whole(".safetensors") == (1 if case == "weights in git" else 0)
    folder = sources.model_folder(NAMED)
    own = tmp_path / "own"
    for name, data in content.items():
        assert isinstance(data, bytes)
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_bytes(data)
    local = Pretrained(name_or_path=str(own))
    assert before == (sources.model_sha256(local), sources.tokenizer_sha256(local), sizes.parameters(local))
    assert before[:2] == (
        sources.files_sha256(folder, sources.model_files(NAMED)),
        sources.files_sha256(folder, sources.TOKENIZER_FILES),
    )
    assert not (folder / "pytorch_model.bin").exists()


def test_a_whole_commit_in_the_cache_is_found_though_the_hub_cannot_be_asked(
    here: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a client that would list its files first, as releases before 2.0 do."""
    folder = sources.model_folder(NAMED)
    pinned = Pretrained(name_or_path=NAMED.name_or_path, revision=folder.name)
    asks = huggingface_hub.snapshot_download

    def listing(*args: Any, local_files_only: bool = False, **kwargs: Any) -> str:
        if not local_files_only:
            raise OfflineModeIsEnabled("no list of files")
        return asks(*args, local_files_only=True, **kwargs)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for client in (asks, listing):
        monkeypatch.setattr("huggingface_hub.snapshot_download", client)
        assert sources.model_folder(pinned) == folder
        with pytest.raises(ConfigError, match="was not found"):
            sources.model_folder(Pretrained(name_or_path="somebody/else", revision=folder.name))


def test_what_is_said_of_a_model_before_and_after_its_download(here: FakeHub) -> None:
    lora = Pretrained(name_or_path="somebody/small", lora=Lora(rank=4))
    before = sizes.shapes(NAMED), sizes.trained_parameters(lora), sizes.shape(NAMED), sizes.positions(NAMED)
    assert sizes.to_download(NAMED) == len(here.newest(SMALL)["model.safetensors"])  # type: ignore[arg-type]
    assert here.whole(".safetensors") == 0
    sources.model_folder(NAMED)
    assert before == (sizes.shapes(NAMED), sizes.trained_parameters(lora), sizes.shape(NAMED), sizes.positions(NAMED))
    assert sizes.to_download(NAMED) == 0 and here.whole(".safetensors") == 1


CODE = {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda f: {"model.safetensors": None, "pytorch_model.bin": f["model.safetensors"]}, "no safetensors weights"),
        (lambda f: {"config.json": None}, "no config.json"),
        (lambda f: {"config.json": json.dumps(json.loads(f["config.json"]) | CODE).encode()}, "code of its own"),
        (
            lambda f: {"model.safetensors.index.json": b'{"weight_map": {"a": "pytorch_model.bin"}}'},
            "names 'pytorch_model.bin' as weights",
        ),
        (
            lambda f: {"model.safetensors.index.json": b'{"weight_map": {"a": "../../x.safetensors"}}'},
            "no safetensors file of this folder",
        ),
    ],
    ids=["pickles", "no config", "code", "index of pickles", "index elsewhere"],
)
def test_what_is_refused_is_refused_before_any_weight_is_asked_for(
    change: Callable[[Files], dict[str, bytes | None]], named: str, here: FakeHub, small: Files
) -> None:
    changed = {**small, **change(small)}
    here.push(SMALL, {name: data for name, data in changed.items() if data is not None})
    for asked in (sources.model_sha256, sizes.parameters):
        with pytest.raises(ConfigError) as raised:
            asked(NAMED)
        assert named in str(raised.value)
    assert not here.fetched(".safetensors") and not here.fetched(".bin")


def test_a_model_that_the_hub_does_not_have_is_not_found(here: FakeHub) -> None:
    for model in (Pretrained(name_or_path="no/body"), Pretrained(name_or_path="somebody/small", revision="v9")):
        with pytest.raises(ConfigError, match=r"The model was not found") as raised:
            sources.model_sha256(model)
        assert "NotFound" in raised.value.why


def test_half_a_model_in_the_cache_is_not_taken_for_one(here: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned with the Hub, so that all but its weights lie in the cache; then the Hub is gone."""
    whole = sources.model_sha256(NAMED)
    hub.forget()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="The model was not found"):
        sources.model_sha256(NAMED)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.forget()
    sources.model_folder(NAMED)
    hub.forget()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert sources.model_sha256(NAMED) == whole


def spin_reg(verb: str, fake: FakeHub, place: Path, *words: str) -> Result:
    """The command in a process of its own, with a home and a Hub's cache in `place`."""
    env = os.environ | fake.environment(place / "home") | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "spin_reg", verb, *words, f"outputs={place}/o"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.mark.slow
def test_a_run_from_the_hub_goes_on_without_it(served: FakeHub, tmp_path: Path) -> None:
    result = spin_reg("train", served, tmp_path, *OWN)
    assert result.code == 0, result.err
    root = tmp_path / "o/run"
    (commit,) = served.commits[SMALL]
    assert json.loads((root / "iterate-00/base.json").read_text())["revision"] == commit
    assert json.loads((root / "run.json").read_text())["sources"]["model"]["commit"] == commit
    assert served.whole(".safetensors") == 1
    gone = FakeHub(port=1)
    result = spin_reg("train", gone, tmp_path, *OWN, "schedule.iterations=2")
    assert result.code == 0 and (root / "iterate-02/model").is_dir(), result.err
    assert not gone.asked


@pytest.mark.slow
def test_a_run_goes_on_with_its_commit_when_the_branch_has_moved(served: FakeHub, tmp_path: Path) -> None:
    """The commit is downloaded anew, and its files still have to be the ones the run began with."""
    assert spin_reg("train", served, tmp_path, *OWN).code == 0
    root = tmp_path / "o/run"
    (commit,) = served.commits[SMALL]
    other = model_files(tmp_path / "other", 1)
    moved = served.push(SMALL, other)
    shutil.rmtree(tmp_path / "home")
    result = spin_reg("train", served, tmp_path, *OWN, "schedule.iterations=2")
    assert result.code == 0, result.err
    cache = tmp_path / "home/hub/models--somebody--small/snapshots"
    assert [path.name for path in cache.iterdir()] == [commit]
    result = spin_reg("train", served, tmp_path, *OWN[:-1], "run_name=new")  # a new run is made of what is there now
    assert result.code == 0 and moved in (tmp_path / "o/new/iterate-00/base.json").read_text(), result.err

    shutil.rmtree(tmp_path / "home")
    served.commits[SMALL][commit] = other  # no commit of git can do that
    shutil.rmtree(root / "iteration-01")
    shutil.rmtree(root / "iterate-00/scores")
    result = spin_reg("train", served, tmp_path, *OWN, "schedule.iterations=2")
    assert result.code != 0 and "is not the one this run was made with" in result.err


@pytest.mark.slow
def test_weights_that_are_not_those_of_the_record_are_refused(served: FakeHub, small: Files, tmp_path: Path) -> None:
    """Also where an SFT stage reads them, and no base.json stands between."""
    data = small["model.safetensors"]
    assert isinstance(data, bytes)
    served.lies["model.safetensors"] = data[:-1] + bytes([data[-1] ^ 1])
    for more in ([], ["model.sft.epochs=1"]):
        result = spin_reg("train", served, tmp_path / str(len(more)), *OWN, *more)
        assert result.code == 1 and "is not the one this run was made with" in result.err, result.err


ZEPHYR = "ac6e600eefcce74f5e8bae1035d4f66019e93190"
MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "vocab_size": 32000, "hidden_size": 4096}
MISTRAL |= {"intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
MISTRAL |= {"max_position_embeddings": 32768, "torch_dtype": "bfloat16"}


def mistral(small: Files) -> Files:
    """Mistral-7B in eight files of which only the headers exist; a small tokenizer with a chat template."""
    h, i, c = 4096, 14336, 1024
    layer = {"self_attn.q_proj": [h, h], "self_attn.k_proj": [c, h], "self_attn.v_proj": [c, h], "mlp.up_proj": [i, h]}
    layer |= {"self_attn.o_proj": [h, h], "mlp.gate_proj": [i, h], "mlp.down_proj": [h, i]}
    layer |= {"input_layernorm": [h], "post_attention_layernorm": [h]}
    shards = [
        {f"model.layers.{k}.{name}.weight": shape for k in range(4 * s, 4 * s + 4) for name, shape in layer.items()}
        for s in range(8)
    ]
    shards[0] |= {"model.embed_tokens.weight": [32000, h]}
    shards[7] |= {"model.norm.weight": [h], "lm_head.weight": [32000, h]}
    names = [f"model-0000{s + 1}-of-00008.safetensors" for s in range(8)]
    index = {"weight_map": {weight: name for name, shard in zip(names, shards, strict=True) for weight in shard}}
    content: Files = {name: data for name, data in small.items() if not name.endswith(".safetensors")}
    content |= {"config.json": json.dumps(MISTRAL).encode(), "model.safetensors.index.json": json.dumps(index).encode()}
    return content | {name: header(shard) for name, shard in zip(names, shards, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["spin", "alpha_spin", "fictitious_play", "mixture_of_two"])
def test_plan_of_a_7b_preset_downloads_no_weights(preset: str, small: Files, tmp_path: Path) -> None:
    """Headers alone (the client reads 100 kB from each file's start); the numbers are those of Mistral-7B."""
    fake = FakeHub()
    content = mistral(small)
    fake.push("models/alignment-handbook/zephyr-7b-sft-full", content, ZEPHYR)
    fake.push("models/alignment-handbook/zephyr-7b-sft-full", {"README.md": b"the newest one is another model"})
    fake.push("datasets/HuggingFaceH4/ultrachat_200k", {"README.md": b"# UltraChat\n"})
    with serving(fake):
        result = spin_reg("plan", fake, tmp_path, f"experiment={preset}", "tracker=none")
    assert result.code == 0, result.err
    asked = fake.fetched(".safetensors")
    assert len(asked) == 8 and all(a.start == 0 and 0 < a.end <= 100_000 for a in asked)
    assert sum(path.stat().st_size for path in (tmp_path / "home").rglob("*") if path.is_file()) < 1_000_000
    assert not (tmp_path / "o").exists()
    tokens = re.search(r"tokens: at most ([\d.]+)M drawn", result.out)
    assert tokens and float(tokens[1]) == pytest.approx(4 * 50_000 * 1024 / 1e6, rel=0.02)  # and few held-out ones
    weights = 7_241_732_096
    memory = {kind: float(size) for kind, size in re.findall(r"(generate|score|train) ([\d.]+) GB", result.out)}
    assert memory["train"] > 16 * weights / 1e9 * 0.74 and min(memory.values()) > 4 * weights / 1e9
    assert "will not fit" in result.out and "14.5 GB of weights to download" in result.out
    disk = re.search(r"disk: ([\d.]+) GB at most \(iterates ([\d.]+) GB", result.out)
    assert disk and float(disk[2]) == pytest.approx(4 * 4 * weights / 1e9, rel=0.01)
