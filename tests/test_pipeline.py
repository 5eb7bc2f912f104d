"""The runner with stub stages, without torch: killed at every point, refused, adopted, extended, owned."""

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from faults import Counter, Killed, before_calls, inside_calls
from hydra import compose, initialize_config_dir

from spin_reg import config, durable, known, overrides, rundir, runner, tables
from spin_reg.context import Context
from spin_reg.errors import ConfigError, DamagedError, NoSpace, RunBusy, SpinRegError
from spin_reg.plan import Sources, Stage, plan
from spin_reg.runner import Status
from spin_reg.specs import ScoreSpec

SOURCES = Sources(model=None, tokenizer="t", data=None)


def stages(*words: str, sources: Sources = SOURCES) -> list[Stage]:
    config.register()
    overrides.register_help(ROOT / "conf")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return plan(config.load(compose("config", ["schedule.iterations=2", *words])), sources)


class Silent:
    def stage(self, index: int, total: int, stage: Stage, state: runner.State) -> None:
        pass

    def progress(self, done: int, total: int, unit: str) -> None:
        pass

    def finished(self, stage: Stage, seconds: float) -> None:
        pass


class Sink:
    def __init__(self) -> None:
        self.rows: list[tuple[int, Any]] = []

    def log(self, index: int, row: dict[str, Any]) -> None:
        self.rows.append((index, row))


def stub(stage: Stage, inputs: dict[str, Path], work: Path, context: Context) -> None:
    """What a stage leaves is a function of its inputs and itself; two files, one of them metrics."""
    read = {role: (folder / "result").read_text() for role, folder in sorted(inputs.items())}
    durable.write_bytes(work / "result", f"{stage.fingerprint} {len(str(read))}".encode())
    row = {"stage": stage.name}
    context.log(row)
    durable.write_jsonl(work / "metrics.jsonl", [row])


def run(plan_: list[Stage], outputs: Path, name: str = "run", *, stage: Callable[..., None] = stub) -> Sink:
    root, sink = outputs / name, Sink()
    root.mkdir(parents=True, exist_ok=True)
    runner.run_all(plan_, root=root, outputs=outputs, listener=Silent(), sink=sink, clock=lambda: 0.0, run=stage)
    return sink


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


FAULTY = ("regularizer=fictitious_play", "schedule.iterations=3", "evaluation=none")


@pytest.mark.slow
def test_cut_at_every_durable_call_the_same_call_goes_on_to_the_same_bytes(memory: Path) -> None:
    """A kill, a full disk, a broken disk at call k, for every k: then the run is the uninterrupted one."""
    assert cut_everywhere(before_calls, memory) > 3 * 7 * len(stages(*FAULTY))


@pytest.mark.slow
def test_cut_inside_every_durable_call(memory: Path) -> None:
    assert cut_everywhere(inside_calls, memory) > 3 * 15 * len(stages(*FAULTY))


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: thousands of small files are written."""
    shm = Path("/dev/shm")
    place = Path(tempfile.mkdtemp(dir=shm if os.access(shm, os.W_OK) else tmp_path))
    yield place
    shutil.rmtree(place)


FAULTS = {"raise": None, "ENOSPC": NoSpace.exit_code, "EIO": SpinRegError.exit_code}  # and the exit code of each


@pytest.mark.parametrize("fault", FAULTS)
def test_a_table_that_is_cut_halfway_through_its_bytes_is_the_old_one(fault: str, tmp_path: Path) -> None:
    """At every write of three row groups and the footer, and at the rename; then the same call makes the new one."""
    old, new = ([{"example_id": f"{name} {i}", "logprob": -1.0} for i in range(600)] for name in ("old", "new"))
    path, wanted = tmp_path / "scores.parquet", tmp_path / "wanted.parquet"
    tables.write(wanted, new, tables.SCORES)
    tables.write(path, old, tables.SCORES)
    before = path.read_bytes()
    for k in itertools.count(1):
        try:
            with inside_calls(Counter(at=k, fault=fault)) as counter:
                tables.write(path, new, tables.SCORES)
            break
        except (Killed, SpinRegError) as error:
            assert getattr(error, "exit_code", None) == FAULTS[fault]
            assert path.read_bytes() == before
            assert fault == "raise" or sorted(tmp_path.iterdir()) == [path, wanted]
    assert k > counter.calls > 10 and path.read_bytes() == wanted.read_bytes()


def cut_everywhere(injected: Callable[[Counter], Any], place: Path) -> int:
    """Cut a run at every point; how many there were.

    A call starts from nothing but the disk, so it is enough to cut each stage from the state at its beginning, to let
    the next call finish that stage, and to compare what is on disk with the uninterrupted run's there. That the
    uninterrupted run's own states lead to its end is shown first.
    """
    made = stages(*FAULTY)
    run(made, place / "straight")
    states = [place / f"state-{i}" for i in range(len(made) + 1)]
    for i, state in enumerate(states):
        state.mkdir()
        run(made[:i], state)
        shutil.copytree(state, place / "end", copy_function=os.link)
        run(made, place / "end")
        assert tree(place / "end") == tree(place / "straight")
        shutil.rmtree(place / "end")
    points = 0
    for i in range(len(made)):
        wanted = tree(states[i + 1])
        for k, fault in itertools.product(range(1, 1000), FAULTS):
            cut = place / "cut"
            shutil.copytree(states[i], cut, copy_function=os.link)
            try:
                with injected(Counter(at=k, fault=fault)) as counter:
                    run(made[: i + 1], cut)
                assert counter.calls < k
                shutil.rmtree(cut)
                break
            except (Killed, SpinRegError) as error:
                assert getattr(error, "exit_code", None) == FAULTS[fault]
            run(made[: i + 1], cut)
            assert tree(cut) == wanted, f"{fault} at {k} of {made[i].name}"
            shutil.rmtree(cut)
            points += 1
    return points


def test_a_finished_run_runs_nothing(tmp_path: Path) -> None:
    made = stages()
    run(made, tmp_path)

    def never(*args: Any) -> None:
        raise AssertionError("a finished stage was run again")

    run(made, tmp_path, stage=never)


def test_more_iterations_run_only_what_is_new(tmp_path: Path) -> None:
    run(stages(), tmp_path)
    seen: list[str] = []

    def noting(stage: Stage, *args: Any) -> None:
        seen.append(stage.name)
        stub(stage, *args)

    run(stages("schedule.iterations=3"), tmp_path, stage=noting)
    new = {"iteration-02/train", "iteration-02/pairs", "iterate-03/evaluate"}
    assert new <= set(seen)
    assert not any(name.startswith(("iterate-00/sft", "iteration-00", "iteration-01")) for name in seen)


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    run(stages("regularizer=none"), tmp_path)
    with pytest.raises(ConfigError) as refused:
        run(stages("regularizer=none", "schedule.learning_rate=2e-4"), tmp_path)
    assert refused.value.what.startswith("iteration-00/train was made with other settings")
    assert "learning_rate: 0.0001 -> 0.0002" in refused.value.why


def test_changed_data_are_refused_by_name(tmp_path: Path) -> None:
    run(stages(), tmp_path)
    with pytest.raises(ConfigError, match="data was made with other settings"):
        run(stages(sources=Sources(model=None, tokenizer="t", data="changed")), tmp_path)


def test_runtime_settings_change_no_fingerprint() -> None:
    names = {s.name: s.fingerprint for s in stages()}
    words = ["hardware.micro_batch_size=1", "hardware.threads=1", "schedule.save_every=1", "generation.batch_size=2"]
    assert {s.name: s.fingerprint for s in stages(*words, "tracker=none", "outputs=x", "run_name=y")} == names


def test_fingerprints_follow_the_meaning_not_the_setting() -> None:
    """alpha = 0 is SPIN in every stage; at iteration 0 all regularizers coincide; then they part."""

    def prints(*words: str) -> dict[str, str]:
        return {s.name: s.fingerprint for s in stages(*words)}

    spin = prints("regularizer=none")
    for same in (["alpha=0"], ["regularizer=fictitious_play", "regularizer.history=1"]):
        assert prints(*same) == spin
    for other in (["alpha=0.5"], ["regularizer=fictitious_play"], ["regularizer=mixture_of_two"], ["regularizer=base"]):
        found = prints(*other)
        first = [n for n in spin if n.startswith(("data", "iterate-00/sft", "iteration-00", "iterate-01/evaluate"))]
        assert len(first) >= 4 and all(found[n] == spin[n] for n in first)
        assert found["iteration-01/train"] != spin["iteration-01/train"]


def test_answers_are_never_made_twice_and_scored_once_per_iterate() -> None:
    for words in (["regularizer.pairs=fresh"], ["regularizer.pairs=union"], ["regularizer.pairs=reuse"]):
        made = stages("regularizer=fictitious_play", "schedule.iterations=4", *words)
        assert len({s.fingerprint for s in made}) == len(made) == len({s.folder for s in made})
        answers = [s for s in made if s.kind == "generate" and "train" in s.name]
        assert len(answers) == (1 + 2 + 3 + 4 if "fresh" in words[0] else 4)
        real = [s.spec.k for s in made if isinstance(s.spec, ScoreSpec) and s.spec.real and s.spec.split == "train"]
        assert real == [0, 1, 2, 3]
        together = [s.spec.window for s in made if isinstance(s.spec, ScoreSpec) and s.spec.real and s.spec.window]
        assert (2, 1, 0) in together  # the newest iterate reads a prompt once with its real and its older answers


def test_base_asks_for_answers_once() -> None:
    made = stages("regularizer=base", "schedule.iterations=4")
    assert [s.name for s in made if s.kind == "generate" and "train" in s.name] == ["iterate-00/answers/train-00"]


def test_each_stage_comes_after_what_it_needs() -> None:
    for regularizer in ("none", "kl", "fictitious_play", "mixture_of_two", "base"):
        seen: set[str] = set()
        for stage in stages(f"regularizer={regularizer}", "schedule.iterations=5"):
            assert {need.name for need in stage.needs.values()} <= seen
            seen.add(stage.name)


def test_a_stage_of_another_run_is_linked_and_outlives_it(tmp_path: Path) -> None:
    run(stages("regularizer=none"), tmp_path, "a")
    seen: list[str] = []

    def noting(stage: Stage, *args: Any) -> None:
        seen.append(stage.name)
        stub(stage, *args)

    run(stages("alpha=0.5"), tmp_path, "b", stage=noting)
    assert "iteration-00/train" not in seen and "iteration-01/train" in seen
    linked = tmp_path / "b/iterate-01/model/result"
    assert linked.samefile(tmp_path / "a/iterate-01/model/result")
    before = tree(tmp_path / "b")
    shutil.rmtree(tmp_path / "a")
    assert tree(tmp_path / "b") == before
    run(stages("alpha=0.5"), tmp_path, "b")


def test_a_damaged_stage_elsewhere_is_not_adopted(tmp_path: Path) -> None:
    run(stages("regularizer=none"), tmp_path, "a")
    path = tmp_path / "a/iterate-00/model/result"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[::-1])
    run(stages("alpha=0.5"), tmp_path, "b")
    assert (tmp_path / "b/iterate-00/model/result").read_bytes() != path.read_bytes()


def test_a_plan_looks_once_at_what_other_runs_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And finds what each stage by itself would; a note that has gone since is no error."""
    run(stages("regularizer=none"), tmp_path, "a")
    made, root = stages("alpha=0.5"), tmp_path / "b"
    alone = [runner.state_of(root, tmp_path, stage) for stage in made]
    looked: list[Path] = []
    real = known.remembered
    monkeypatch.setattr(known, "remembered", lambda outputs: looked.append(outputs) or real(outputs))
    assert runner.states(root, tmp_path, made) == alone and looked == [tmp_path]
    assert {state.status for state in alone} == {Status.reuse, Status.todo}
    notes = real(tmp_path)
    shutil.rmtree(tmp_path / known.STAGES)
    assert all(known.elsewhere(tmp_path, stage, notes=notes) == [] for stage in made)


def hurt(path: Path, damage: str) -> None:
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
        return
    if damage == "flip":
        content[len(content) // 2] ^= 1
    path.write_bytes(content if damage == "flip" else content[:-4])


@pytest.mark.parametrize("damage", ["truncate", "remove", "flip"])
@pytest.mark.parametrize("file", ["result", "stage.json", "metrics.jsonl"])
def test_what_can_be_made_again_is_named_and_made_again(
    damage: str, file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = stages()
    run(made, tmp_path)
    whole = tree(tmp_path / "run")
    pairs = next(stage for stage in made if stage.folder == "iteration-00")
    path = tmp_path / "run/iteration-00" / file
    hurt(path, damage)
    if (damage, file) != ("remove", "stage.json"):  # without a manifest the stage is simply not there
        assert str(path) in runner.state_of(tmp_path / "run", tmp_path / "alone", pairs).reason
    shutil.rmtree(tmp_path / ".stages")
    run(made, tmp_path)
    assert tree(tmp_path / "run") == whole


@pytest.mark.parametrize("damage", ["truncate", "remove", "flip"])
@pytest.mark.parametrize("file", ["result", "stage.json", "metrics.jsonl"])
def test_damaged_weights_are_refused_by_name(damage: str, file: str, tmp_path: Path) -> None:
    if (damage, file) == ("remove", "stage.json"):
        return
    made = stages()
    run(made, tmp_path)
    path = tmp_path / "run/iterate-01/model" / file
    hurt(path, damage)
    with pytest.raises(DamagedError) as found:
        run(made, tmp_path)
    assert str(path) in found.value.where


def test_a_flipped_byte_anywhere_in_a_manifest_is_found(tmp_path: Path) -> None:
    run(stages("schedule.iterations=1"), tmp_path)
    path = tmp_path / "run/iterate-01/model/stage.json"
    path.chmod(0o644)
    content = path.read_bytes()
    for i in range(0, len(content), 3):
        for bit in (1, 32):
            path.write_bytes(content[:i] + bytes([content[i] ^ bit]) + content[i + 1 :])
            with pytest.raises(DamagedError):
                rundir.manifest(path.parent)


def test_what_is_made_again_must_be_what_later_stages_were_made_from(tmp_path: Path) -> None:
    made = stages()
    run(made, tmp_path)
    shutil.rmtree(tmp_path / ".stages")
    hurt(tmp_path / "run/iteration-00/result", "truncate")

    def otherwise(stage: Stage, inputs: dict[str, Path], work: Path, context: Context) -> None:
        durable.write_bytes(work / "result", b"another machine rounds otherwise")

    with pytest.raises(DamagedError, match="iteration-00/pairs was made again and is not what it was"):
        run(made, tmp_path, stage=otherwise)
    assert not (tmp_path / "run/iteration-00.tmp").exists()


def test_a_stage_of_other_inputs_is_not_taken_over(tmp_path: Path) -> None:
    """Two runs may hold the same stage in other bits (threads, machines): what is adopted must fit what is here."""
    run(stages("regularizer=none"), tmp_path, "a")

    def otherwise(stage: Stage, inputs: dict[str, Path], work: Path, context: Context) -> None:
        stub(stage, inputs, work, context)
        durable.write_bytes(work / "more", b"x")

    (tmp_path / ".stages").rename(tmp_path / "kept")
    run(stages("regularizer=none", "schedule.iterations=1")[:1], tmp_path, "b", stage=otherwise)
    shutil.rmtree(tmp_path / ".stages")
    (tmp_path / "kept").rename(tmp_path / ".stages")
    seen: list[str] = []

    def noting(stage: Stage, *args: Any) -> None:
        seen.append(stage.name)
        stub(stage, *args)

    run(stages("regularizer=none"), tmp_path, "b", stage=noting)
    assert "iterate-00/sft" in seen  # its data are not those that run a's base was fitted to


def test_metrics_are_the_stages_in_plan_order_and_are_mirrored_by_line(tmp_path: Path) -> None:
    made = stages()
    sink = run(made, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in lines] == [stage.name for stage in made]
    assert {index: row for index, row in sink.rows} == dict(enumerate(lines))
    again = run(made, tmp_path)
    assert [row for _, row in again.rows] == lines


def test_states_say_why(tmp_path: Path) -> None:
    made = stages()
    states = [runner.state_of(tmp_path / "run", tmp_path, stage) for stage in made]
    assert {state.status for state in states} == {Status.todo}
    run(made, tmp_path)
    other = [runner.state_of(tmp_path / "b", tmp_path, stage) for stage in made]
    assert {state.status for state in other} == {Status.reuse} and "run/data" in other[0].reason


def test_two_owners_in_two_processes(tmp_path: Path) -> None:
    import subprocess
    import sys

    hold = (
        "import sys, pathlib\nfrom spin_reg import rundir\n"
        "with rundir.owned(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == "held\n"
        with pytest.raises(RunBusy) as busy, rundir.owned(tmp_path):
            pass
        assert str(owner.pid) in busy.value.why
        owner.kill()
    with rundir.owned(tmp_path):  # the lock of a dead process is free
        pass


def test_other_evaluation_settings_make_the_evaluation_anew_and_nothing_else(tmp_path: Path) -> None:
    run(stages(), tmp_path)
    seen: list[str] = []

    def noting(stage: Stage, *args: Any) -> None:
        seen.append(stage.kind)
        stub(stage, *args)

    run(stages("evaluation.num_samples=3"), tmp_path, stage=noting)
    assert seen == ["evaluate"] * 3
    run(stages("evaluation.num_samples=3"), tmp_path, stage=noting)
    assert len(seen) == 3


@pytest.mark.slow
def test_batch_sizes_are_part_of_a_stage_in_bf16_and_only_there() -> None:
    def prints(*words: str) -> dict[str, str]:
        return {s.name: s.fingerprint for s in stages(*words)}

    assert prints("hardware.score_batch_size=3") == prints()
    for bf16 in ("hardware.precision=bf16", "model.dtype=bfloat16"):
        one, other = prints(bf16), prints(bf16, "hardware.score_batch_size=3")
        assert one["iterate-00/scores/train-00-real-from-00"] != other["iterate-00/scores/train-00-real-from-00"]
        assert one["iterate-00/sft"] != other["iterate-00/sft"]
