"""Nothing that comes from a file, a model, a setting or a record runs code, and nothing is pickled."""

import ast
import io
import json
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, SMALL, Command, Result, read_all
from safetensors.torch import save
from transformers import LlamaConfig, LlamaForCausalLM

from spin_reg import checkpoint, durable, iterates, models, render, rundir, sources
from spin_reg.corpora import Hub, Jsonl
from spin_reg.errors import ConfigError, DamagedError, DataError
from spin_reg.fingerprint import digest, file_sha256
from spin_reg.settings import Dtype, Pretrained
from spin_reg.specs import Policy

QUICK = ["schedule.iterations=1", "dataset.num_prompts=8", "generation.max_new_tokens=4", "evaluation=none"]
OWN = [word for word in SMALL if not word.startswith("model.")]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def four(result: Result, code: int, *named: str) -> None:
    """The command ended with four lines (after those of the stages done), this exit code, and these words."""
    assert result.code == code, result.err
    lines = [line for line in result.err.strip().splitlines() if not line.startswith("[")]
    starts = ("spin-reg: ", "  where: ", "  why:   ", "  to do: ")
    assert len(lines) == 4 and all(line.startswith(s) for line, s in zip(lines, starts, strict=True)), result.err
    for word in named:
        assert word in result.err, result.err


# Pickles, in the sources

PICKLING = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"torch.load", "torch.save", "pandas.read_pickle", "pd.read_pickle", "eval", "exec", "compile", "os.system"}


def pickling(source: str) -> list[str]:
    """What in a source reads or writes pickles, or runs text as code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.partition(".")[0] in PICKLING]
        if isinstance(node, ast.ImportFrom):
            found += [node.module for _ in [0] if node.module and node.module.partition(".")[0] in PICKLING]
            found += [a.name for a in node.names if f"{node.module}.{a.name}" in CALLS]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            words = {word.arg: ast.unparse(word.value) for word in node.keywords}
            found += [name] if name in CALLS or name.endswith((".to_pickle", ".read_pickle")) else []
            if name in ("yaml.load", "yaml.compose", "yaml.load_all") and "Safe" not in words.get("Loader", ""):
                found.append(name)
            found += [word for word in ("allow_pickle", "trust_remote_code") if words.get(word) == "True"]
            if (
                name.endswith(("import_module", "__import__"))
                and {ast.unparse(a).strip("'") for a in node.args} & PICKLING
            ):
                found.append(name)
    return found


SOURCES = [*sorted((ROOT / "spin_reg").rglob("*.py")), *sorted((ROOT / "scripts").glob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_source_pickles(path: Path) -> None:
    assert pickling(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import joblib.memory as m",
        "from cloudpickle import loads",
        "torch.load(path)",
        "from torch import save",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.FullLoader)",
        "yaml.load(text)",
        "frame.to_pickle(path)",
        "importlib.import_module('dill')",
        "AutoConfig.from_pretrained(x, trust_remote_code=True)",
        "eval(text)",
    ],
)
def test_the_scan_of_sources_sees(source: str) -> None:
    assert pickling(source)


# Pickles, in what is written


def is_pickle(content: bytes) -> bool:
    """Whether bytes are a pickle, or a zip file that holds one, as torch.save writes it."""
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return any(is_pickle(archive.read(name)) for name in archive.namelist())
    return content[:1] == b"\x80" and content[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and content[-1:] == b"."


def pickles(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and is_pickle(p.read_bytes())]


def test_the_scan_of_files_sees(tmp_path: Path) -> None:
    for protocol in range(2, 6):
        (tmp_path / f"{protocol}").write_bytes(pickle.dumps({"a": 1}, protocol=protocol))
    torch.save({"a": torch.ones(2)}, tmp_path / "zip")
    (tmp_path / "good.safetensors").write_bytes(save({"a": torch.ones(2)}))
    assert {p.name for p in pickles(tmp_path)} == {"2", "3", "4", "5", "zip"}


def test_a_run_and_a_checkpoint_hold_no_pickle(train: Callable[..., Path], tmp_path: Path) -> None:
    root = train(*QUICK)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    checkpoint.write(tmp_path, model, optimizer, [{}])
    assert list(tmp_path.glob("checkpoint-*/optimizer.safetensors")) and list(root.rglob("*.safetensors"))
    assert pickles(tmp_path) == []


# Pickles, laid before us


class Evil:
    """Opening a pickle of this makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.canary), "w"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a chat template."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = models.byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def base(llama: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(llama, tmp_path / "base"))


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that nothing may make."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code was run"


def words(base: Path | str, outputs: Path) -> list[str]:
    own = [*OWN, "model=pretrained", f"model.name_or_path={base}", "run_name=run", f"outputs={outputs}"]
    return [*own, "schedule.iterations=1", "schedule.epochs=1", "schedule.optimizer=adamw", "schedule.beta=0.5"]


def test_the_canary_sings(tmp_path: Path) -> None:
    torch.save({"a": Evil(tmp_path / "canary")}, tmp_path / "pytorch_model.bin")
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "canary").exists()


def test_a_pickle_beside_safetensors_is_never_opened(base: Path, canary: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl", "adapter_model.bin"):
        torch.save({"a": Evil(canary)}, base / name)
    loaded = models.start(Pretrained(name_or_path=str(base)))
    assert torch.isfinite(loaded.model.lm_head.weight).all()


def test_weights_as_a_pickle_alone_are_refused(base: Path, canary: Path, command: Command, tmp_path: Path) -> None:
    (base / "model.safetensors").unlink()
    torch.save({"a": Evil(canary)}, base / "pytorch_model.bin")
    four(command("train", *words(base, tmp_path / "o")), 2, "safetensors", "pickle", "save_pretrained")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_under_the_name_of_safetensors_is_refused(
    zipped: bool, base: Path, canary: Path, command: Command, tmp_path: Path
) -> None:
    torch.save({"a": Evil(canary)}, base / "model.safetensors", _use_new_zipfile_serialization=zipped)
    four(command("train", *words(base, tmp_path / "o"), "model.sft.epochs=1"), 1, "cannot be read", str(base))


@pytest.mark.parametrize("name", ["evil.bin", "../evil.safetensors", "/evil.safetensors"])
def test_an_index_names_no_other_files(name: str, base: Path, canary: Path) -> None:
    torch.save({"a": Evil(canary)}, base / "evil.bin")
    (base / "model.safetensors").rename(base / "other.safetensors")
    weight_map = {"model.norm.weight": "other.safetensors", "lm_head.weight": name}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(ConfigError, match=name):
        models.start(Pretrained(name_or_path=str(base)))


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_config_names_no_other_weights(base: Path, canary: Path) -> None:
    torch.save({"a": Evil(canary)}, base / "adapter_model.bin")
    edit(base / "config.json", transformers_weights="adapter_model.bin")
    with pytest.raises(ConfigError, match="adapter_model.bin"):
        models.start(Pretrained(name_or_path=str(base)))


# Code that comes with a model

MODELING = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({canary!r}).write_text("imported")


class OwnConfig(LlamaConfig):
    model_type = "own-llama"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
AUTO_MAP = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}


def give_code(folder: Path, canary: Path) -> None:
    """Make a model one that asks for code of its own."""
    (folder / "modeling_own.py").write_text(MODELING.format(canary=str(canary)))
    edit(folder / "config.json", model_type="own-llama", architectures=["OwnModel"], auto_map=AUTO_MAP)


@pytest.fixture
def hub(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot of somebody/own in a Hub cache of its own, without a network."""
    folder = tmp_path / "hub/models--somebody--own"
    snapshot = Path(shutil.copytree(llama, folder / "snapshots" / COMMIT))
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("builtins.input", lambda *asked: "y")  # the one who says yes to everything
    return snapshot


def test_code_of_a_model_is_refused(hub: Path, canary: Path, command: Command, tmp_path: Path) -> None:
    give_code(hub, canary)
    for more in ([], [f"model.revision={COMMIT}"]):
        result = command("train", *words("somebody/own", tmp_path / "o"), *more)
        four(result, 2, "code of its own", "modeling_own.OwnModel", "model.trust_remote_code=true", "config.json")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("known", [True, False], ids=["llama", "unknown"])
def test_code_of_a_folder_is_refused(
    known: bool, base: Path, canary: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *asked: "y")
    give_code(base, canary)
    if known:
        edit(base / "config.json", model_type="llama")
    four(command("train", *words(base, tmp_path / "o")), 2, "code of its own", str(base))


def test_code_of_a_tokenizer_is_refused(base: Path, canary: Path) -> None:
    (base / "tokenization_own.py").write_text(MODELING.format(canary=str(canary)))
    edit(base / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_own.Own", None]})
    with pytest.raises(ConfigError, match="tokenization_own"):
        models.load_tokenizer(Pretrained(name_or_path=str(base)))


def test_the_libraries_are_told_no_even_where_our_look_misses(
    base: Path, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *asked: "y")
    monkeypatch.setattr(sources, "_refuse_code", lambda folder, trusted: None)
    give_code(base, canary)
    with pytest.raises(ConfigError):
        models.start(Pretrained(name_or_path=str(base)))
    with pytest.raises(ConfigError):
        iterates.load(base, Policy(Dtype.float32, None, None))
    (base / "generation_config.json").unlink()
    with pytest.raises(ConfigError):
        models.generation_config(Pretrained(name_or_path=str(base)))


@pytest.mark.parametrize("revision", [None, "main", COMMIT[:39], COMMIT + "0", COMMIT.upper(), COMMIT + "\n"])
def test_trust_needs_a_whole_commit(revision: str | None) -> None:
    with pytest.raises(ValueError, match="40 hex"):
        Pretrained(name_or_path="somebody/own", revision=revision, trust_remote_code=True)


def test_trust_in_a_branch_is_refused(command: Command, tmp_path: Path) -> None:
    more = ["model.trust_remote_code=true", "model.revision=main"]
    four(command("train", *words("somebody/own", tmp_path / "o"), *more), 2, "trust_remote_code", "40 hex")
    assert not (tmp_path / "o").exists()


def test_trust_needs_the_hub(base: Path, canary: Path, command: Command, tmp_path: Path) -> None:
    give_code(base, canary)
    more = ["model.trust_remote_code=true", f"model.revision={COMMIT}"]
    four(command("train", *words(base, tmp_path / "o"), *more), 2, "local folder", "pinned")


def test_trusted_code_lies_beside_its_weights(hub: Path, canary: Path) -> None:
    give_code(hub, canary)
    edit(hub / "config.json", auto_map={"AutoModelForCausalLM": "somebody/else--modeling_own.OwnModel"})
    with pytest.raises(ConfigError, match="does not pin"):
        sources.model_folder(Pretrained(name_or_path="somebody/own", revision=COMMIT, trust_remote_code=True))


def test_a_trusted_models_code_is_part_of_its_hash(hub: Path, tmp_path: Path) -> None:
    trusted = Pretrained(name_or_path="somebody/own", revision=COMMIT, trust_remote_code=True)
    plain = Pretrained(name_or_path="somebody/own", revision=COMMIT)
    before = [f(m) for f in (sources.model_sha256, sources.tokenizer_sha256) for m in (trusted, plain)]
    (hub / "modeling_own.py").write_text("# other code\n")
    after = [f(m) for f in (sources.model_sha256, sources.tokenizer_sha256) for m in (trusted, plain)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, True, False, True]


@pytest.mark.slow
def test_pinned_code_runs_through_an_iteration(hub: Path, command: Command, tmp_path: Path) -> None:
    give_code(hub, tmp_path / "sang")
    more = ["model.trust_remote_code=true", f"model.revision={COMMIT}", "schedule.iterations=2"]
    result = command("train", *words("somebody/own", tmp_path / "o"), *more)
    assert result.code == 0, result.err
    assert (tmp_path / "sang").exists() and (tmp_path / "o/run/iterate-02/model/modeling_own.py").exists()
    assert json.loads((tmp_path / "o/run/iterate-00/base.json").read_text())["revision"] == COMMIT


# Code that comes by configuration


@pytest.mark.parametrize(
    "word",
    [
        "+hydra.callbacks.x={_target_: os.system, command: 'touch {canary}'}",
        "+hydra.callbacks.x._target_=os.system",
        "model._target_=os.system",
        "+model={_target_: os.system}",
        "experiment=../../../anywhere/x",
        "hydra/launcher=../../x",
        "--experimental-rerun=x.pickle",
        "--config-name=../x",
    ],
)
def test_words_that_could_run_code_are_refused(word: str, canary: Path, command: Command) -> None:
    for verb in ("train", "plan", "evaluate"):
        result = command(verb, word.replace("{canary}", str(canary)))
        four(result, 2, word.partition("=")[0].partition("{")[0], "its own folder" if ".." in word else "run")


CALLBACK = "hydra: {callbacks: {x: {TARGET: builtins.open, file: CANARY, mode: w}}}"
HOSTILE = {
    "callback": CALLBACK.replace("TARGET", "_target_"),
    "escaped": CALLBACK.replace("TARGET", '"_tar\\x67et_"'),
    "decoded": "hydra: {callbacks: \"${oc.decode:'{x: {_tar${first:get}_: builtins.open, file: CANARY, mode: w}}'}\"}",
    "logging": "hydra: {job_logging: {version: 1, root: {handlers: [a]}, "
    "handlers: {a: {class: subprocess.Popen, args: [touch, CANARY]}}}}",
    "factory": "hydra: {job_logging: {version: 1, root: null, formatters: {a: {(): builtins.open, file: CANARY}}}}",
    "python": 'seed: !!python/object/apply:os.system ["touch CANARY"]',
    "tag": "seed: !own 1",
    "elsewhere": "defaults: [../../x]\nseed: 1",
    "searchpath": "hydra: {searchpath: ['file:///tmp']}",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_yaml_that_could_run_code_is_refused_by_name(
    kind: str, canary: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "conf/experiment/theirs.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("# @package _global_\n" + HOSTILE[kind].replace("CANARY", str(canary)))
    for flags in (["--config-dir", str(tmp_path / "conf")], [f"-cd={tmp_path / 'conf'}"]):
        four(command("plan", *flags, "experiment=theirs"), 2, str(path), "Configuration")
    if kind == "callback":
        (tmp_path / "link").mkdir()
        (tmp_path / "link/inner").symlink_to(tmp_path / "conf")
        for flag in (
            f"--config-path={tmp_path / 'conf'}",
            f"-cp={tmp_path / 'link'}",
            f"--config-d={tmp_path / 'conf'}",
        ):
            four(command("plan", flag), 2, "theirs.yaml")
        (tmp_path / "a b").symlink_to(tmp_path / "conf")
        for place in (f"[file://{tmp_path / 'conf'}]", f"['file://{tmp_path / 'a b'}']", f'["{tmp_path / "a b"}"]'):
            four(command("plan", f"hydra.searchpath={place}", "experiment=theirs"), 2, "theirs.yaml")
        monkeypatch.setenv("THEIRS", str(tmp_path / "conf"))
        for place in ("['file://${oc.env:THEIRS}']", f"{tmp_path / 'conf'},{tmp_path / 'link'}"):
            four(command("plan", "-m", f"hydra.searchpath={place}", "experiment=theirs"), 2, "hydra.searchpath")


def test_an_innocent_yaml_and_plugins_by_name_go_on_working(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "conf/experiment/mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("# @package _global_\ndefaults: [{override /loss: ipo}]\nschedule: {beta: 7}\n")
    (tmp_path / "conf/up").symlink_to(tmp_path)
    (tmp_path / "conf/notes.yaml").write_text("{ not yaml")
    shown = command("train", "--config-dir", str(tmp_path / "conf"), "experiment=mine", "--cfg", "job")
    assert shown.code == 0 and "beta: 7" in shown.out and "name: ipo" in shown.out, shown.err
    sweep = ["-m", "hydra/launcher=basic", "hydra/sweeper=basic", "hydra.sweeper.max_batch_size=1", "seed=0,1"]
    planned = command("plan", *sweep, f"outputs={tmp_path / 'o'}")
    assert planned.code == 0 and planned.out.count("run ") == 2, planned.err


def a_record(root: Path, **fields: Any) -> None:
    """A run folder with a run.json."""
    root.mkdir(parents=True, exist_ok=True)
    value = {"created": "", "cwd": str(root), "iterations": 1, "overrides": [], "settings": {}, "sources": {}}
    durable.write_record(root / "run.json", value | {"versions": {}} | fields)


@pytest.mark.parametrize(
    "word",
    [
        "+hydra.callbacks.x={_target_: os.system}",
        "hydra.callbacks=x",
        "hydra/launcher=x",
        "--config-dir=/tmp",
        "-cd",
        "+/hydra/callbacks=x",
        "model={_target_: x}",
        3,
    ],
)
def test_a_record_with_words_that_could_run_code_is_refused(word: Any, command: Command, tmp_path: Path) -> None:
    a_record(tmp_path / "run", overrides=["seed=1", word])
    four(command("resume", str(tmp_path / "run")), 2, "run.json", str(word))
    four(command("evaluate", str(tmp_path / "run")), 2, "run.json", str(word))


# Names that become paths


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "..", ""])
def test_a_manifest_names_files_of_its_own_folder_alone(name: str, tmp_path: Path) -> None:
    value = {"fingerprint": "f", "spec": {}, "version": 1, "needs": {}, "inputs": {}, "content": "", "removed": []}
    durable.write_record(tmp_path / "stage.json", value | {"files": {"a": {"size": 1, "sha256": ""}}})
    assert rundir.manifest(tmp_path) is not None
    durable.write_record(tmp_path / "stage.json", value | {"files": {name: {"size": 1, "sha256": ""}}})
    with pytest.raises(DamagedError, match=rf"it is not a manifest \(the file {name}\)"):
        rundir.manifest(tmp_path)


def test_a_hostile_stage_of_another_run_places_nothing(train: Callable[..., Path], tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    first = train(*QUICK, name="first")
    model = first / "iterate-00/model"
    (first / "payload").write_text("theirs")
    found = durable.read_record(model / "stage.json")
    found["files"]["../../payload"] = {"size": 6, "sha256": file_sha256(first / "payload")}
    durable.write_record(model / "stage.json", found)
    data_stage = next(p for p in (outputs / ".stages").iterdir() if "first/data" in p.read_text())
    shutil.copytree(first / "data", tmp_path / "away/data")
    data_stage.write_text("../away/data\n")
    (first / "data/stage.json").unlink()
    second = train(*QUICK, name="second")
    assert not (second / "payload").exists()
    for stage in ("data", "iterate-00/model"):  # made here, not taken over
        assert all(p.stat().st_nlink == 1 for p in (second / stage).iterdir()), stage


# Hostile files

NESTED = "[" * 100_000


def header(length: int, text: bytes = b"") -> bytes:
    return length.to_bytes(8, "little") + text


def tensors(offsets: dict[str, tuple[int, int]], size: int = 8) -> bytes:
    """A safetensors file of 8 bytes of data with these offsets."""
    text = json.dumps({n: {"dtype": "F32", "shape": [1], "data_offsets": list(o)} for n, o in offsets.items()}).encode()
    return header(len(text), text + bytes(size))


WEIGHTS = {
    "empty": b"",
    "header beyond the file": header(10**6, b"{}"),
    "header of 2^63": header(2**63, b"{}"),
    "overlap": tensors({"a": (0, 4), "b": (2, 6)}),
    "hole": tensors({"a": (0, 4), "b": (8, 12)}, 12),
    "out of range": tensors({"a": (0, 4), "b": (4, 400)}),
    "backwards": tensors({"a": (4, 0)}),
    "not json": header(4, b"[[[["),
    "nested": header(len(NESTED), NESTED.encode()),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_hostile_safetensors_are_refused(kind: str, base: Path) -> None:
    (base / "model.safetensors").write_bytes(WEIGHTS[kind])
    with pytest.raises(DamagedError, match="cannot be read"):
        models.start(Pretrained(name_or_path=str(base)))


@pytest.mark.slow
@pytest.mark.parametrize("size", [99_000_000, 101_000_000])
def test_a_header_of_100_mb_is_refused(size: int, base: Path) -> None:
    text = b'{"a":' + b" " * (size - 6) + b"}"
    (base / "model.safetensors").write_bytes(header(len(text), text))
    with pytest.raises(DamagedError, match="cannot be read"):
        models.start(Pretrained(name_or_path=str(base)))


@pytest.mark.parametrize("content", ["{", "[]", "3", "null", NESTED, '{"model_type": "no-such"}', "{}", "\xff"])
def test_a_hostile_config_is_refused(content: str, base: Path) -> None:
    (base / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        models.start(Pretrained(name_or_path=str(base)))
    assert str(base) in caught.value.where


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["garbage \x00", "[]", NESTED])
def test_hostile_tokenizer_files_are_refused(name: str, content: str, base: Path) -> None:
    (base / name).write_text(content)
    model = Pretrained(name_or_path=str(base))
    with pytest.raises(ConfigError) as caught:
        models.end_ids(models.generation_config(model), models.load_tokenizer(model))
    assert str(base) in caught.value.where


def checked(value: dict[str, Any]) -> str:
    """A record's text with the checksum that belongs to it."""
    return json.dumps(value | {"checksum": digest(value)})


DEEP = '{"checksum": "", "files": ' + "[" * 900 + "]" * 900 + "}"  # not too deep to parse


@pytest.mark.parametrize(
    "content",
    [
        *("{", "[]", "3", "null", '"text"', NESTED, DEEP, "{}"),
        *map(checked, [{}, {"files": {"a": 3}}, {"files": []}, {"files": {}}, {"files": {"a": {"size": 1}}}]),
    ],
)
def test_hostile_records_are_refused(content: str, command: Command, tmp_path: Path) -> None:
    for name in ("run.json", "stage.json", "base.json"):
        (tmp_path / name).write_text(content)
    four(command("resume", str(tmp_path)), 1, "run.json")
    assert command("status", str(tmp_path)).code == 0
    with pytest.raises(DamagedError, match="finished stage"):
        rundir.manifest(tmp_path)
    with pytest.raises(DamagedError, match="base model"):
        iterates.load(tmp_path, Policy(Dtype.float32, None, None))


@pytest.mark.parametrize(
    "content",
    [
        *("{", "[]", "null", NESTED, DEEP),
        *map(checked, [{}, {"sha256": []}, {"sha256": {}}, {"sha256": {"a": 1}}, {"sha256": {"../../a": ""}}]),
        *({"rows": None}, {"rows": {}}, {"numbers": None}, {"numbers": []}, {"sha256": {}}, {"sha256": None}),
    ],
)
def test_a_hostile_checkpoint_is_passed_over(content: str | dict[str, Any], tmp_path: Path) -> None:
    """A text in the place of state.json, or fields of a whole one that are others."""
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint.write(tmp_path, model, optimizer, [{"step": 1}])
    state = tmp_path / "checkpoint-000000001/state.json"
    if isinstance(content, dict):
        content = checked({k: v for k, v in (durable.read_record(state) | content).items() if v is not None})
    state.write_text(content)
    assert checkpoint.read(tmp_path, model, optimizer) == []
    assert not state.parent.exists()


TEMPLATES = {
    "globals": "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr": "{{ (''|attr('__class__')).mro() }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "write": "{{ messages.append(1) }}",
    "range": "{% for i in range(10 ** 12) %}{% endfor %}",
    "syntax": "{% for %}",
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_template_stays_in_its_sandbox(kind: str, base: Path, canary: Path) -> None:
    (base / "chat_template.jinja").write_text(TEMPLATES[kind].replace("CANARY", str(canary)))
    tokenizer = models.load_tokenizer(Pretrained(name_or_path=str(base)))
    with pytest.raises(ConfigError, match="chat template"):
        render.prompt_ids(tokenizer, [{"role": "user", "content": "a"}])


def test_a_template_that_reaches_out_ends_in_four_lines(base: Path, canary: Path, command: Command) -> None:
    (base / "chat_template.jinja").write_text(TEMPLATES["globals"].replace("CANARY", str(canary)))
    four(command("train", *words(base, base.parent / "o")), 2, "may not touch", "SecurityError", str(base))
    assert not (base.parent / "o").exists()


def test_rows_that_a_template_refuses_are_rows_that_cannot_be_used(
    base: Path, command: Command, tmp_path: Path
) -> None:
    template = (base / "chat_template.jinja").read_text()
    refusal = "{% if 'bad' in messages[0]['content'] %}{{ raise_exception('no bad words') }}{% endif %}"
    (base / "chat_template.jinja").write_text(refusal + template)
    lines = [{"prompt": f"{'bad' if i < 20 else 'good'} {i}", "response": "x"} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    own = [word for word in words(base, tmp_path / "o") if not word.startswith("dataset")]
    more = ["dataset=jsonl", f"dataset.path={tmp_path / 'rows.jsonl'}", "dataset.num_heldout=4"]
    four(command("train", *own, *more), 3, "rows would be dropped", "no bad words")


def test_hostile_parquet_is_refused_or_plain(tmp_path: Path, canary: Path) -> None:
    path = tmp_path / "rows.parquet"
    for content in (b"", b"PAR1", b"PAR1" + b"\xff" * 100 + b"PAR1", pickle.dumps(Evil(canary))):
        path.write_bytes(content)
        with pytest.raises(DataError, match="Parquet"):
            read_all(Jsonl(path=str(path)))
    kind = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(Evil(canary))}
    schema = pa.schema([pa.field("prompt", pa.string(), metadata=kind), pa.field("response", pa.string())])
    pq.write_table(pa.table([["a"], ["b"]], schema=schema), path)
    (example,), _ = read_all(Jsonl(path=str(path)))
    assert example.messages[0]["content"] == "a"


@pytest.mark.parametrize("content", ["{", NESTED, "3", pickle.dumps({}).decode("latin-1")])
def test_hostile_json_data_are_refused(content: str, tmp_path: Path) -> None:
    for name in ("rows.json", "rows.jsonl"):
        (tmp_path / name).write_bytes(content.encode("latin-1"))
        with pytest.raises(DataError) as caught:
            read_all(Jsonl(path=str(tmp_path / name)))
        assert caught.value.exit_code == 3


@pytest.mark.parametrize("kind", ["script", "pickle", "archive"])
def test_a_data_folder_with_code_or_pickles_is_refused(kind: str, tmp_path: Path, canary: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    if kind == "script":
        (folder / "theirs.py").write_text(f"open({str(canary)!r}, 'w')\n")
    elif kind == "pickle":
        (folder / "train.pkl").write_bytes(pickle.dumps(Evil(canary)))
    else:
        import tarfile

        torch.save({"a": Evil(canary)}, tmp_path / "0.pth")
        with tarfile.open(folder / "train-0.tar", "w") as archive:
            archive.add(tmp_path / "0.pth", "0.pth")
    with pytest.raises(DataError, match="made of webdataset files" if kind == "archive" else "could not be loaded"):
        read_all(Hub(path=str(folder)))
