"""How much disk a run takes: estimated before it begins, and given back when nothing needs it."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import SMALL, Command, weights

from spin_reg import iterates, models, rundir, sizes, space
from spin_reg.settings import Pretrained, Tiny

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def kept(root: Path) -> list[int]:
    """The iterates whose weights are there."""
    return [k for k in range(9) if (root / f"iterate-{k:02d}/model/model.safetensors").exists()]


@pytest.mark.parametrize("shape", [(16, 1, 2), (48, 3, 4)])
def test_weights_are_counted_without_loading_them(shape: tuple[int, int, int], tmp_path: Path) -> None:
    spec = Tiny(hidden_size=shape[0], num_layers=shape[1], num_heads=shape[2])
    model = models.start(spec)
    count = sum(p.numel() for p in model.model.parameters())
    iterates.save(model, tmp_path)
    assert sizes.parameters(spec) == sizes.parameters(Pretrained(name_or_path=str(tmp_path))) == count


@pytest.mark.slow
@pytest.mark.parametrize("words", [["regularizer=fictitious_play"], ["keep_iterates=last"]])
def test_the_estimate_holds_and_is_not_far_off(
    words: list[str], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = [0]
    publish = rundir.publish

    def weighed(root: Path, *args: object) -> None:
        most[0] = max(most[0], size(root))
        publish(root, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(rundir, "publish", weighed)
    settings = [*SMALL, *words, "schedule.save_every=1", f"outputs={tmp_path}", "run_name=run"]
    told = command("plan", *settings).out.splitlines()[-1]
    assert command("train", *settings).code == 0
    number, unit = told.split("disk: ")[1].split()[:2]
    estimate = float(number) * {"kB": 1e3, "MB": 1e6}[unit]
    assert most[0] < estimate < 4 * most[0]
    assert "free" in told


def test_a_disk_without_room_exits_6_before_anything_is_made(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    monkeypatch.setattr(models, "start", never)
    result = command("train", *SMALL, f"outputs={tmp_path / 'o'}")
    assert result.code == 6 and "100 kB are free" in result.err and len(result.err.splitlines()) == 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "left", "longer"),
    [
        pytest.param(["alpha=0.5", "keep_iterates=last"], [2], [3], marks=pytest.mark.slow),
        (["alpha=0.5", "keep_iterates=needed"], [0, 2], [0, 3]),
        pytest.param(
            ["regularizer=mixture_of_two", "keep_iterates=needed"], [0, 1, 2], [0, 2, 3], marks=pytest.mark.slow
        ),
        pytest.param(
            ["regularizer=fictitious_play", "keep_iterates=needed"], [0, 1, 2], [0, 1, 2, 3], marks=pytest.mark.slow
        ),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
@pytest.mark.slow
def test_only_needed_weights_stay_and_what_comes_later_is_the_same(
    words: list[str], left: list[int], longer: list[int], train: Train, command: Command, outputs: Path, tmp_path: Path
) -> None:
    everything = train(words[0], "schedule.iterations=3", name=words[0].replace("=", "-"), outputs=outputs)
    root = train(*words, outputs=tmp_path)
    assert kept(root) == left
    assert "finished" in command("resume", str(root)).err
    assert command("resume", str(root), "schedule.iterations=3").code == 0
    assert kept(root) == longer and weights(root, 3) == weights(everything, 3)
    assert (root / "metrics.jsonl").read_bytes() == (everything / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    "words",
    [
        ["regularizer=fictitious_play", "keep_iterates=last"],
        ["regularizer=mixture_of_two", "keep_iterates=last"],
        ["regularizer.history=2", "keep_iterates=last"],
        ["tracker=wandb", "tracker.log_model=true", "keep_iterates=needed"],
    ],
    ids=" ".join,
)
def test_removals_that_would_hurt_are_refused(words: list[str], command: Command, tmp_path: Path) -> None:
    result = command("train", *SMALL[1:], *words, f"outputs={tmp_path / 'o'}")
    assert result.code == 2 and "keep_iterates" in result.err
    assert list(tmp_path.iterdir()) == []


def test_weights_that_were_removed_come_again_as_it_is_told(train: Train, command: Command) -> None:
    root = train("alpha=0.5", "keep_iterates=last")
    told = command("export", str(root), "--iterate", "1", "--to", str(root.parent / "x")).err
    said = re.search(r"to do: rm -r (\S+); spin-reg (resume .*) makes it again", told)
    assert said and "its weights were removed" in told, told
    shutil.rmtree(said[1])
    assert command(*said[2].split()).code == 0
    assert command("export", str(root), "--iterate", "1", "--to", str(root.parent / "x")).code == 0


def test_what_needs_removed_weights_makes_them_again(train: Train, command: Command, tmp_path: Path) -> None:
    root = train("alpha=0.5", "keep_iterates=last")
    path = root / "iterate-00/answers/train-00/answers.parquet"
    whole = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(whole[:-1])
    (root.parent / ".stages").rename(tmp_path / "gone")
    result = command("resume", str(root))
    assert result.code == 0 and "is damaged" in result.err and "were removed, and are needed again" in result.err
    assert path.read_bytes() == whole and kept(root) == [2]


@pytest.mark.slow
def test_gc_shows_before_it_removes(train: Train, command: Command, tmp_path: Path) -> None:
    place = tmp_path / "outputs"
    root = train("alpha=0.5")
    shared = train("regularizer=none", name="other")
    (root / "iteration-07.tmp").mkdir()
    (root / "iteration-07.tmp/half").write_bytes(b"x" * 5000)
    before = sorted(place.rglob("*"))
    shown = command("gc", str(place), "keep_iterates=last").out
    assert "given up" in shown and "5 kB" in shown and "nothing was removed" in shown
    assert "iterate-01/model/model.safetensors" in shown and "another run holds it too" in shown
    assert sorted(place.rglob("*")) == before
    total = re.search(r"^(\S+ \S+) to be freed", shown, re.M)
    assert "given up" in command("gc", str(root)).out and kept(root) == [0, 1, 2]
    removed = command("gc", str(place), "keep_iterates=last", "--yes")
    assert removed.code == 0 and total and f"{total[1]} removed" in removed.out  # what both runs hold, too
    assert kept(root) == kept(shared) == [2] and not (root / "iteration-07.tmp").exists()
    assert "0 B to be freed" in command("gc", str(place), "keep_iterates=last").out
    assert "finished" in command("resume", str(root)).err


@pytest.mark.slow
def test_evaluate_and_a_folder_of_ones_own_cost_no_weights(train: Train, command: Command) -> None:
    """What `evaluate` plans is not the whole run; what lies in a finished stage's folder is not ours to judge."""
    words = ["regularizer=mixture_of_two", "keep_iterates=needed", "evaluation=none", "schedule.iterations=2"]
    root = train(*words)
    before = kept(root)
    assert command("evaluate", str(root), "evaluation=default").code == 0
    assert before == [1, 2] and kept(root) == [0, 1, 2]  # the base was made again, and nothing was taken away
    (root / "iterate-02/model/backup.tmp").mkdir()
    assert command("gc", str(root), "--yes").code == 0
    assert set(before) <= set(kept(root)) and (root / "iterate-02/model/backup.tmp").is_dir()


@pytest.mark.slow
def test_gc_leaves_a_run_at_work_and_a_damaged_one_alone(train: Train, command: Command) -> None:
    root, bad = train("schedule.iterations=1"), train("schedule.iterations=1", name="bad")
    (bad / "run.json").write_text("{}")
    with rundir.owned(root):
        shown = command("gc", str(root.parent), "keep_iterates=last", "--yes").out
    assert "at work" in shown and "record of a run is damaged" in shown and kept(root) == [0, 1]
    assert (
        command("gc", str(root), "--force").code == command("gc", str(root), "keep_iterates=lst").code == 2
        and command("gc", "nowhere").code == 2
    )
