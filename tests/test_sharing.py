"""Training in several processes: who reads what, and that it comes to what one process comes to."""

import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Command, read_jsonl
from safetensors.torch import load_file
from test_processes import trap  # noqa: F401
from torch.distributed.fsdp import FSDPModule

from spin_reg import console, durable, processes, sharing
from spin_reg.errors import ConfigError, NonFiniteError
from spin_reg.settings import Dtype, Hardware, Lora, Pretrained, Quantize, Sharding

WORDS = [*SMALL, "schedule.iterations=1", "schedule.epochs=3", "schedule.batch_size=7", "schedule.learning_rate=1e-3"]
WORDS += ["schedule.save_every=2", "hardware.batch_tokens=48", "evaluation=none", "run_name=run"]
MODEL = "iterate-01/model"
STEPS = 3 * math.ceil(24 / 7)
ZERO = pytest.mark.skipif(find_spec("deepspeed") is None, reason="the extra deepspeed is not installed")
COARSE = (5e-3, 2e-4)  # the same under autocast in bfloat16; found were 1.2e-3 and 8e-5
LOSSES, WEIGHTS = 1e-5, 2e-6  # between numbers of processes: rounding of sums, and what AdamW and RMSprop make of it


def test_each_row_is_read_once_in_as_many_turns_by_every_rank() -> None:
    slots = [5, 40, 7, 7, 30, 12, 3, 44, 9]
    for world in (1, 2, 3, 5, 12):
        dealt = sharing.turns(range(9), slots.__getitem__, tokens=48, most=None, world=world)
        assert len(dealt) == world and len({len(micros) for micros in dealt}) == 1
        assert sorted(i for micros in dealt for micro in micros for i in micro) == list(range(9))
        assert all(sum(slots[i] for i in micro) <= 48 for micros in dealt for micro in micros)
        assert dealt == sharing.turns(range(9), slots.__getitem__, tokens=48, most=None, world=world)
    two = sharing.turns(range(9), slots.__getitem__, tokens=1000, most=None, world=2)
    read = [sum(slots[i] for micro in micros for i in micro) for micros in two]
    assert abs(read[0] - read[1]) <= max(slots)
    single = sharing.turns([3, 1, 2], slots.__getitem__, tokens=48, most=1, world=1)
    assert sorted(i for (i,) in single[0]) == [1, 2, 3]


def test_a_sum_of_shares_is_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    told = [{"loss": 1.25, "margin": -2.0}, {}, {"loss": 0.5, "margin": 3.0}]
    monkeypatch.setattr(sharing.ranks, "gathered", lambda value, poll=None: told)
    assert sharing.totals({}) == {"loss": 1.75, "margin": 1.0}


def test_what_one_rank_finds_all_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    found = NonFiniteError("A what.", where="a", why="b", todo="c")
    monkeypatch.setattr(sharing.ranks, "world", lambda: 2)
    monkeypatch.setattr(sharing.ranks, "gathered", lambda value, poll=None: [value, sharing.errors.told(found)])
    with pytest.raises(NonFiniteError, match="A what"):
        sharing.agreed(lambda: None)


def test_a_lone_process_has_all_of_it() -> None:
    p = torch.nn.Parameter(torch.arange(3.0))
    assert sharing.whole(p) is p and sharing.own(p) is p and not sharing.sharded(p)
    p.grad = torch.ones(3)
    sharing.add_up([p])
    assert p.grad.tolist() == [1, 1, 1]


@pytest.mark.parametrize("main", [True, False])
def test_what_is_kept_is_put_together_on_the_main_rank_alone(main: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Laid:
        def full_tensor(self) -> torch.Tensor:
            return torch.arange(6.0).view(2, 3).t()

    monkeypatch.setattr(sharing.ranks, "is_main", lambda: main)
    found = sharing.on_main(Laid())  # type: ignore[arg-type]
    assert found.is_contiguous() and found.tolist() == ([[0, 3], [1, 4], [2, 5]] if main else [])
    assert sharing.on_main(torch.ones(2)).tolist() == [1, 1]


@pytest.mark.parametrize("kind", ["full", "zero1", "zero2"])
def test_one_process_has_nobody_to_share_with(kind: str, command: Command, tmp_path: Path) -> None:
    result = command("train", *WORDS, f"outputs={tmp_path}", f"hardware.sharding={kind}")
    assert result.code == 2 and f"hardware.sharding={kind}" in result.err and not any(tmp_path.iterdir())
    assert "one process" in result.err


def test_what_zero_needs_is_told_before_anything_begins(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "find_spec", lambda name: None)
    result = command("train", *WORDS, f"outputs={tmp_path}", "hardware=deepspeed")
    assert result.code == 2 and "hardware.sharding=zero2" in result.err and not any(tmp_path.iterdir())
    assert "pip install spin-reg[deepspeed]" in result.err
    monkeypatch.setattr(processes, "find_spec", lambda name: object())
    two, coarse = Hardware(processes=2, sharding=Sharding.zero1), Pretrained(name_or_path="m", dtype=Dtype.bfloat16)
    for version, fits in [("0.19.7", False), ("0.19.8", True), ("0.19.12+cu128", True), ("0.20.0", False)]:
        monkeypatch.setattr(processes.metadata, "version", lambda name, version=version: version)
        if fits:
            processes.check(two, Pretrained(name_or_path="m"))
            with pytest.raises(ConfigError, match="model.dtype=float32"):
                processes.check(two, coarse)
        else:
            with pytest.raises(ConfigError, match=f"DeepSpeed {version} is installed"):
                processes.check(two, Pretrained(name_or_path="m"))
    monkeypatch.setattr(processes.metadata, "version", lambda name: "0.19.8")
    processes.check(two, Pretrained(name_or_path="m", dtype=Dtype.bfloat16, lora=Lora(rank=2)))
    processes.check(Hardware(processes=2, sharding=Sharding.full), coarse)
    with pytest.raises(ConfigError, match="model.lora.quantize=nf4"):
        processes.check(two, Pretrained(name_or_path="m", lora=Lora(rank=2, quantize=Quantize.nf4)))


def test_a_base_in_8_bits_is_not_laid_across_processes() -> None:
    full = Hardware(processes=2, sharding=Sharding.full)
    for kind in Quantize:
        model = Pretrained(name_or_path="m", lora=Lora(rank=2, quantize=kind))
        if kind is Quantize.int8:
            with pytest.raises(ConfigError, match="model.lora.quantize=int8"):
                processes.check(full, model)
        else:
            processes.check(full, model)


@pytest.fixture(scope="module")
def made(undisturbed: Callable[..., Path]) -> Path:
    """The run, made in one process."""
    return undisturbed(*WORDS)


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """That run, with its training still to be done."""
    shutil.copytree(made, tmp_path / "outputs/run")
    shutil.rmtree(tmp_path / "outputs/run" / MODEL)
    return tmp_path / "outputs/run"


def near(root: Path, made: Path, losses: float = LOSSES, weights: float = WEIGHTS) -> None:
    """The same steps to 1e-5, the same files, and weights as near as is said."""
    steps = [(a, b) for a, b in zip(*(read_jsonl(r / "metrics.jsonl") for r in (root, made)), strict=True)]
    assert len(steps) >= STEPS
    for one, other in steps:
        assert set(one) == set(other)
        ties = abs(other.get("train/margin", 1.0)) < 1e-5  # at the start all margins are 0, but for rounding
        for key in set(one) - ({"train/accuracy"} if ties else set()):
            assert one[key] == pytest.approx(other[key], rel=losses, abs=losses), key
    names = {path.name for path in (made / MODEL).iterdir()}
    assert {path.name for path in (root / MODEL).iterdir()} == names
    for name in names & {"model.safetensors", "adapter_model.safetensors"}:
        ours, theirs = load_file(root / MODEL / name), load_file(made / MODEL / name)
        assert list(ours) == list(theirs)
        for key in ours:
            assert ours[key].dtype == theirs[key].dtype
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=weights)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["hardware.processes=2"],
        ["hardware.processes=2", "hardware.sharding=full"],
        ["hardware.processes=3", "hardware.sharding=full", "hardware.gradient_checkpointing=true"],
        pytest.param(["hardware.processes=2", "hardware.sharding=zero1"], marks=ZERO),
        pytest.param(["hardware=deepspeed"], marks=ZERO),
        pytest.param(
            ["hardware.processes=3", "hardware.sharding=zero1", "hardware.gradient_checkpointing=true"], marks=ZERO
        ),
    ],
    ids=[
        "two",
        "two sharded",
        "three sharded, checkpointing",
        "two, zero1",
        "two, zero2",
        "three, zero1, checkpointing",
    ],
)
def test_several_processes_train_as_one_does(words: list[str], made: Path, root: Path, command: Command) -> None:
    """Steps of 7, 7, 7 and 3 pairs, so that ranks have unequal shares, and one of three at times a row or none."""
    from transformers import AutoModelForCausalLM

    result = command("train", *WORDS, f"outputs={root.parent}", *words)
    assert result.code == 0, result.err
    near(root, made)
    zero = any("zero" in word or "deepspeed" in word for word in words)
    assert ("deepspeed" in durable.read_record(root / "run.json")["versions"]) == zero
    model = AutoModelForCausalLM.from_pretrained(root / MODEL)
    assert type(model).__name__ == "LlamaForCausalLM" and model.lm_head.weight.shape == (261, 16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "quantize"), [("full", "none"), ("full", "nf4"), pytest.param("zero1", "none", marks=ZERO)]
)
def test_an_adapter_over_a_base_of_several_processes(
    kind: str, quantize: str, made: Path, undisturbed: Callable[..., Path], command: Command, tmp_path: Path
) -> None:
    if quantize != "none":
        pytest.importorskip("bitsandbytes", reason="the extra qlora is not installed")
    words = [word for word in WORDS if not word.startswith("model.")]
    words += ["model=pretrained", f"model.name_or_path={made / 'iterate-00/model'}", "model.lora.rank=2"]
    words += ["schedule.optimizer=adamw", "loss=sft", "hardware.precision=fp32", f"model.lora.quantize={quantize}"]
    alone = undisturbed(*words)
    shutil.copytree(alone, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / MODEL)
    both = ["hardware.processes=2", f"hardware.sharding={kind}"]
    result = command("train", *words, f"outputs={tmp_path}", *both)
    assert result.code == 0, result.err
    near(tmp_path / "run", alone)


@pytest.fixture
def stopped(
    root: Path,
    command: Command,
    trap: Callable[..., None],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Path]:
    """Train in two processes till a signal comes at the fifth step; the checkpoint that is kept of it."""

    def progress(self: Any, done: int, total: int, unit: str) -> None:
        if (done, unit) == (5, "step"):
            os.kill(os.getpid(), signal.SIGTERM)

    def run(sharding: str, more: str = "") -> Path:
        trap(IN_TIME + more)
        with monkeypatch.context() as patch:
            patch.setattr(console.Screen, "progress", progress)
            both = ["hardware.processes=2", f"hardware.sharding={sharding}"]
            result = command("train", *WORDS, f"outputs={root.parent}", *both)
        assert result.code == 75 and "Stopped by SIGTERM" in result.err, result.err
        (kept,) = root.glob(f"{MODEL}.tmp/.scratch/checkpoint-*")
        assert kept.suffix != ".tmp" and 5 <= int(kept.name[-9:]) < STEPS
        return kept

    return run


IN_TIME = """
    after(fit._State, "update", lambda state, row: time.sleep(0.5 * (row["step"] >= 5)))
"""
SLOW = """
    from spin_reg import stopping
    stopping.GRACE = 1.0
    def slow(path, content):
        if path.name == "optimizer.safetensors" and "-000000004." not in str(path) and "-000000002." not in str(path):
            time.sleep(4)
    after(durable, "write_bytes", slow)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sharding", "other"),
    [
        ("none", ["hardware.processes=2", "hardware.sharding=full"]),
        ("full", []),
        pytest.param("zero2", [], marks=ZERO),
        pytest.param("none", ["hardware.processes=3", "hardware.sharding=zero1"], marks=ZERO, id="none-zero1"),
    ],
)
def test_a_signal_stops_all_ranks_at_one_step_and_another_number_goes_on(
    sharding: str,
    other: list[str],
    made: Path,
    root: Path,
    command: Command,
    stopped: Callable[..., Path],
    trap: Callable[..., None],  # noqa: F811
) -> None:
    stopped(sharding)
    trap()
    assert command("train", *WORDS, f"outputs={root.parent}", *other).code == 0
    near(root, made)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full", pytest.param("zero2", marks=ZERO)])
def test_a_checkpoint_that_takes_longer_than_a_signal_waits_is_kept(
    sharding: str, stopped: Callable[..., Path]
) -> None:
    stopped(sharding, SLOW)


TRAINED = """
import sys
import pytest
import torch
from spin_reg import ranks, zero
from spin_reg.errors import ConfigError
from spin_reg.settings import Sharding

class Part(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.seldom, self.never = (torch.nn.Parameter(torch.ones(5) * n) for n in (1, 2, 3))
    def forward(self, x, seldom):
        return (self.used * x).sum() + (self.seldom.square().sum() if seldom else 0.0)

def steps(part, optimizer, backward, scorer, seldom):
    for step in range(4):
        backward(scorer(torch.arange(5.0) + step, seldom(step)), True)
        norms.append(optimizer.norm() if part is not alone else float(sum(
            p.grad.square().sum() for p in part.parameters() if p.grad is not None) ** 0.5))
        optimizer.step()
        optimizer.zero_grad()

def made(part):
    return torch.optim.AdamW(part.parameters(), lr=0.1, weight_decay=0.5)

ranks.join()
alone, part, other = Part(), Part(), Part()
norms = []
optimizer = made(alone)
steps(alone, optimizer, lambda loss, last: loss.backward(), alone, lambda step: True)
ours = zero.Zero(part, made(part), Sharding.zero1, 1e9)
steps(part, ours, ours.backward, ours.scorer, lambda step: True)
for (name, one), two in zip(alone.named_parameters(), part.parameters()):
    torch.testing.assert_close(one, two, rtol=0, atol=1e-6, msg=name)
kept = ours.state_dict()["state"]
assert part.never.tolist() == [3] * 5 and (set(kept) == {0, 1} if ranks.is_main() else not kept)
for i in kept:
    theirs = optimizer.state_dict()["state"][i]
    assert set(kept[i]) == set(theirs)
    for name in theirs:
        torch.testing.assert_close(kept[i][name], theirs[name])
assert norms[4:] == pytest.approx(norms[:4], rel=1e-6)
ours.backward(ours.scorer(torch.full((5,), torch.inf), True), True)
assert ours.norm() == torch.inf
ours.backward(ours.scorer(torch.full((5,), torch.nan), True), True)
assert ours.norm() == torch.inf
ours = zero.Zero(other, made(other), Sharding.zero2, 1e9)
try:
    steps(other, ours, ours.backward, ours.scorer, lambda step: step != 2)
except ConfigError as error:
    assert "seldom" in error.where and "used" not in error.where.partition(",")[2]
else:
    sys.exit("was not refused")
"""


@ZERO
@pytest.mark.slow
def test_under_zero_a_weight_without_gradient_stays_and_one_that_has_it_at_times_is_refused(tmp_path: Path) -> None:
    """As torch's AdamW leaves it, weight decay or not; the state that is kept is the one that torch would keep."""
    (tmp_path / "trained.py").write_text(TRAINED)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "trained.py")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "DS_ACCELERATOR": "cpu"}
    ended = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


UNEQUAL = """
import sys
import torch
from spin_reg import ranks, sharing

class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.seldom, self.never = (torch.nn.Parameter(torch.ones(5) * n) for n in (1, 2, 3))
    def forward(self, x, seldom):
        return self.used * x + (self.seldom.square() if seldom else 0.0)

class Model(torch.nn.Module):
    _no_split_modules = ["Layer"]
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer(), Layer()])
        self.seldom, self.idle = torch.nn.Parameter(torch.ones(5) * 4), torch.nn.Parameter(torch.ones(5) * 5)
    def forward(self, x, seldom):
        for i, layer in enumerate(self.layers):
            x = layer(x, seldom if i else not seldom)
        return (x * self.seldom).sum() if seldom else x.sum()

class Scorer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Model()
    def forward(self, x, seldom):
        return self.model(x, seldom)

def loss(scorer, step, rank, turn):  # in step 1 both ranks reach the same, in steps 2 and 3 none reaches all
    seldom = {0: rank == 0, 1: True, 2: False, 3: False, 4: rank == 1 and turn == 1}[step]
    return scorer(torch.arange(5.0) + step + 2 * rank + turn, seldom)

def steps(scorer, own, scale, add_up):
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=0.1, weight_decay=0.5)
    has = []
    for step in range(5):
        for turn in range(2):
            for rank in own:
                (scale * loss(scorer, step, rank, turn)).backward()
        add_up(scorer)
        has.append([name for name, p in scorer.named_parameters() if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad()
    state = [[float(s["step"]), sharing.whole(s["exp_avg"])] for s in optimizer.state_dict()["state"].values()]
    return has, {name: sharing.whole(p.detach()) for name, p in scorer.named_parameters()}, state

torch.manual_seed(0)
ranks.join()
alone, several = Scorer(), Scorer()
if sys.argv[1] == "none":
    summed = lambda scorer: sharing.add_up(list(scorer.parameters()))
else:
    sharing.shard(several, several.model, torch.device("cpu"))
    summed = sharing.drop_unreached
one = steps(alone, (0, 1), 1, lambda scorer: None)
two = steps(several, (ranks.rank(),), 1 if sys.argv[1] == "none" else 2, summed)  # FSDP takes the mean
assert one[0] == two[0], (one[0], two[0])
assert len({tuple(names) for names in one[0]}) > 1 and not any("never" in name for name in one[0][1])
for name in one[1]:
    torch.testing.assert_close(one[1][name], two[1][name], rtol=0, atol=1e-5, msg=name)
for (at, mean), (step, other) in zip(one[2], two[2], strict=True):
    assert at == step
    torch.testing.assert_close(mean, other)
"""


SHARES = """
import re
import sys
from pathlib import Path
import torch
from spin_reg import fit, iterates, models, ranks, scorer, sharing
from spin_reg.settings import Dtype, Hardware, LrScheduler, Optimizer, Quantize, Sharding
from spin_reg.specs import Policy

folder, large = Path(sys.argv[1]), sys.argv[2] == "large"
models.environment(1)
ranks.join()

def held():  # without what is mapped of files
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def read(dtype, as_stored):
    model = models.from_folder(folder, Policy(dtype, None, None, Quantize.none, False), as_stored=as_stored)
    return models.ready(model, models.byte_tokenizer()).model

if not ranks.is_main():
    def whole(model):
        raise AssertionError("one rank finds that out for all")
    fit.reads_packed = scorer.reads_packed = whole
spec = fit.FitSpec(1e-3, Optimizer.rmsprop, LrScheduler.constant, 0.0, 0.0, 1.0, 64, None, False, 9, 0, Sharding.full)
accelerator = iterates.accelerator(Hardware(processes=2, sharding=Sharding.full))
for dtype in (Dtype.float32, Dtype.bfloat16):
    before = held()
    model = read(dtype, sharing.thin(Sharding.full, False))
    grown = held() - before
    policy, *_ = fit._prepared(model, spec, accelerator, lambda: None)
    found = {name: sharing.whole(p.detach()) for name, p in policy.named_parameters()} | dict(policy.named_buffers())
    ranks.wait()
    one = scorer.Scorer(read(dtype, False), policy.packs)
    size = sum(p.numel() * p.element_size() for p in one.parameters())
    expected = {name: p.detach() for name, p in one.named_parameters()} | dict(one.named_buffers())
    assert list(found) == list(expected) and len(expected) > len(list(one.parameters()))
    for name, value in expected.items():
        assert value.dtype == found[name].dtype and torch.equal(value, found[name]), name
    assert one.model.lm_head.weight is one.model.get_input_embeddings().weight
    if large and dtype is Dtype.float32 and not ranks.is_main():
        assert grown < 0.5 * size, (grown, size)
    ranks.wait()
"""


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["large", "scaled"])
def test_a_rank_reads_its_share_of_the_weights(kind: str, stored: str, tmp_path: Path) -> None:
    """To the bit as they would be read whole, and buffers, some of which are made in the dtype of the weights; until
    then no memory is taken for any, in whatever dtype they are stored, and nothing is tried out on them.
    """
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

    sizes = {"vocab_size": 300, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    sizes |= {"num_hidden_layers": 2, "intermediate_size": 64, "tie_word_embeddings": True}
    if kind == "large":
        sizes |= {"hidden_size": 1024, "num_hidden_layers": 4, "intermediate_size": 4096}
    config = LlamaConfig(**sizes) if kind == "large" else Gemma3TextConfig(**sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, stored))
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "shares.py").write_text(SHARES)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "shares.py")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words, str(tmp_path / "model"), kind]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr


def test_experts_are_refused_where_torch_would_hang() -> None:
    """Before 2.13, which sums zeros for weights that a rank does not reach."""
    dense, experts = torch.nn.Module(), torch.nn.Module()
    dense.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    experts.experts = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    dense.mlp = torch.nn.Linear(2, 2)
    sharing._allow_unequal(dense)
    dense.mlp = experts
    with pytest.raises(ConfigError, match="full, mlp.experts"):
        sharing._allow_unequal(dense)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "full"])
def test_ranks_that_reach_other_weights_make_the_step_of_one_process(kind: str, tmp_path: Path) -> None:
    """A gradient that a rank lacks is zero where another has one, and there is none where none has: AdamW leaves such
    a weight alone, decay and moments too.
    """
    if kind == "full" and not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        pytest.skip("torch before 2.13 cannot")
    (tmp_path / "unequal.py").write_text(UNEQUAL)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "unequal.py"), kind]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr


@ZERO
@pytest.mark.slow
@pytest.mark.parametrize("launcher", [False, True])
def test_deepspeed_does_not_speak_on_the_standard_output(launcher: bool, root: Path, made: Path) -> None:
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if launcher else []
    words = [*several, "-m", "spin_reg", "train", *WORDS, f"outputs={root.parent}"]
    words += ["hardware.sharding=zero1"] if launcher else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    environment.pop("DS_ACCELERATOR", None)
    ended = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == ""  # what is for people goes to the standard error
    near(root, made)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", pytest.param("zero2", marks=ZERO)])
def test_autocast_in_several_processes(
    kind: str, undisturbed: Callable[..., Path], command: Command, tmp_path: Path
) -> None:
    """Rows are packed with others than in one process, and bfloat16 rounds them otherwise: to so much."""
    words = [*WORDS, "hardware.precision=bf16"]
    alone = undisturbed(*words)
    shutil.copytree(alone, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / MODEL)
    result = command("train", *words, f"outputs={tmp_path}", "hardware.processes=2", f"hardware.sharding={kind}")
    assert result.code == 0, result.err
    near(tmp_path / "run", alone, losses=COARSE[0], weights=COARSE[1])
