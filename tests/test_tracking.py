"""Trackers mirror metrics.jsonl and can never hurt a run."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import SMALL, Command, read_jsonl

from spin_reg import durable, rundir, tracking
from spin_reg.errors import ConfigError, DamagedError
from spin_reg.settings import Tracker, Wandb

Train = Callable[..., Path]
QUICK = ["schedule.iterations=1", "dataset.num_prompts=8", "generation.max_new_tokens=4", "evaluation=none"]
TRACKED = [word for word in SMALL if not word.startswith("tracker")]


@pytest.fixture(autouse=True)
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit codes with which the process would have ended at once; it goes on as after a plain exit."""
    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(tracking, "_unclosed", set())
    return codes


@pytest.fixture
def forever() -> Iterator[Event]:
    """What a hanging tracker waits for; the test's end frees it."""
    event = Event()
    yield event
    event.set()


def wandb_records(folder: Path) -> list[Any]:
    """The records of an offline run: a 7-byte header, then 32 KiB blocks of (crc32, length, kind) chunks."""
    internal = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    (path,) = folder.glob("*.wandb")
    content, position, parts, records = path.read_bytes(), 7, b"", []
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length = int.from_bytes(content[position + 4 : position + 6], "little")
        kind = content[position + 6]
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = internal.Record()
            record.ParseFromString(parts)
            records.append(record)
            parts = b""
    return records


def alone(tmp_path: Path, *words: str, without: tuple[str, ...] = (), **env: str) -> str:
    """The command in a process of its own, with no key and the home folder of nobody; its output."""
    code = (
        f"import sys\nfrom spin_reg import cli\nsys.argv = ['spin-reg', *{list(words)!r}]\n"
        "try:\n    cli.main()\n"
        f"finally:\n    assert not {set(without)!r} & set(sys.modules)\n"
    )
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path / "home")} | env
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env, timeout=75)
    assert done.returncode == 0, done.stderr
    return done.stdout


def history(folder: Path) -> list[dict[str, Any]]:
    """The history rows of an offline run."""
    records = [record.history for record in wandb_records(folder) if record.HasField("history")]
    return [{".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.item} for record in records]


@pytest.mark.slow
def test_wandb_offline_holds_every_row_the_samples_the_settings_and_the_models(tmp_path: Path) -> None:
    alone(tmp_path, "train", *TRACKED, "tracker.log_model=true", f"outputs={tmp_path}", "run_name=run")
    root = tmp_path / "run"
    (folder,) = (root / "wandb").glob("offline-run-*")
    records, sent = wandb_records(folder), history(folder)
    rows = read_jsonl(root / "metrics.jsonl")
    assert [item["_step"] for item in sent] == list(range(len(rows)))
    for item, row in zip(sent, rows, strict=True):
        assert {key: item[key] for key in row} == row
    tables = {key.partition(".")[0] for item in sent for key in item if key.startswith("samples/")}
    assert tables == {f"samples/iterate_{k:02d}" for k in range(3)}
    config = {u.key for record in records if record.HasField("run") for u in record.run.config.update}
    assert "regularizer.alpha" in config
    run_ids = {record.run.run_id for record in records if record.HasField("run")}
    assert run_ids == {json.loads((root / "wandb.json").read_text())["id"]}
    artifacts = {record.request.log_artifact.artifact.name for record in records if record.HasField("request")}
    artifacts |= {record.artifact.name for record in records if record.HasField("artifact")}
    assert {f"run-iterate-{k:02d}" for k in range(3)} <= artifacts
    shutil.rmtree(root / "wandb")
    said = alone(tmp_path, "sync", str(root), without=("torch", "transformers"))
    (again,) = (root / "wandb").glob("offline-run-*")
    assert f"{len(rows)} of {len(rows)} rows written to W&B, offline, in {again}; nothing was sent" in said
    assert [{key: item[key] for key in ("_step", *row)} for item, row in zip(history(again), rows, strict=True)] == [
        {"_step": step, **row} for step, row in enumerate(rows)
    ]
    assert {r.run.run_id for r in wandb_records(again) if r.HasField("run")} == run_ids


@pytest.mark.slow
def test_wandb_offline_after_a_resume_holds_the_whole_history_under_one_id(tmp_path: Path) -> None:
    """W&B's own resume does nothing offline, so each process replays metrics.jsonl with its steps."""
    alone(tmp_path, "train", *TRACKED, f"outputs={tmp_path}", "run_name=run", "schedule.iterations=1")
    alone(tmp_path, "resume", str(tmp_path / "run"), "schedule.iterations=2")
    rows = read_jsonl(tmp_path / "run/metrics.jsonl")
    folders = sorted((tmp_path / "run/wandb").glob("offline-run-*"), key=lambda p: p.stat().st_mtime)
    assert len(folders) == 2 and len({folder.name.rpartition("-")[2] for folder in folders}) == 1
    assert [item["_step"] for item in history(folders[-1])] == list(range(len(rows)))


class Fake:
    """A tracker that keeps what it is told, and does `act` first when it is asked to `place` (open, log or close)."""

    place = "the fake"

    def __init__(self, trouble: str = "", act: Callable[[], object] = lambda: None) -> None:
        self._trouble, self._act = trouble, act
        self.asked: list[str] = []
        self.rows: list[int] = []
        self.codes: list[int] = []

    @property
    def sent(self) -> int:
        return len(self.rows)

    def _meet(self, method: str) -> None:
        self.asked.append(method)
        if method == self._trouble:
            self._act()

    def open(self, *args: object) -> "Fake":
        self._meet("open")
        return self

    def log(self, index: int, row: dict[str, Any]) -> None:
        self._meet("log")
        self.rows.append(index)

    def close(self, exit_code: int) -> None:
        self._meet("close")
        self.codes.append(exit_code)


def refuse() -> None:
    raise OSError("it is\n down")


def mirrored(monkeypatch: pytest.MonkeyPatch, fake: Fake, root: Path, *indices: int, patience: float = 60.0) -> None:
    """What a run does with its tracker."""
    monkeypatch.setattr(tracking, "_open", fake.open)
    with tracking.mirror(root, Tracker("tensorboard", patience), {}) as mirror:
        for index in indices:
            mirror.log(index, {})


def test_every_row_is_sent_once_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake()
    mirrored(monkeypatch, fake, tmp_path, 0, 1, 1, 0, 2)
    assert fake.rows == [0, 1, 2] and fake.codes == [0]


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 75), (tracking.Stopped("", where="", why="", todo=""), 75), (OSError(), 1)],
)
def test_the_tracker_is_told_how_the_run_ended(
    error: BaseException, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake()
    monkeypatch.setattr(tracking, "_open", fake.open)
    with pytest.raises(type(error)), tracking.mirror(tmp_path, Tracker("tensorboard"), {}):
        raise error
    assert fake.codes == [code]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("trouble", ["open", "log", "close"])
def test_a_tracker_that_hangs_is_left_behind(
    trouble: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    forever: Event,
    ended: list[int],
) -> None:
    mirrored(monkeypatch, Fake(trouble, forever.wait), tmp_path, 0, 1, patience=0.1)
    (told,) = caplog.messages
    assert "did not finish within 0.1 s" in told and f"`spin-reg sync {tmp_path}` sends the rest" in told
    with pytest.raises(SystemExit):
        tracking.leave(0)
    assert ended == [0]


@pytest.mark.parametrize("trouble", ["open", "log", "close"])
def test_a_tracker_that_raises_is_told_once_and_asked_nothing_more(
    trouble: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    ended: list[int],
) -> None:
    fake = Fake(trouble, refuse)
    mirrored(monkeypatch, fake, tmp_path, 0, 1)
    (told,) = caplog.messages
    assert "the tracker failed (OSError: it is down)" in told and f"`spin-reg sync {tmp_path}`" in told
    assert fake.asked.count(trouble) == 1 and fake.asked[-1] == trouble
    with pytest.raises(SystemExit):
        tracking.leave(3)
    assert ended == [3]  # its own hooks at exit could hang


def test_a_tracker_that_ends_well_leaves_an_ordinary_exit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: list[int]
) -> None:
    mirrored(monkeypatch, Fake(), tmp_path, 0)
    with pytest.raises(SystemExit) as end:
        tracking.leave(3)
    assert end.value.code == 3 and ended == []


@pytest.mark.timeout(120)
def test_a_stopped_run_waits_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, forever: Event
) -> None:
    monkeypatch.setattr(tracking, "AFTER_A_SIGNAL", 0.1)
    monkeypatch.setattr(tracking, "_open", Fake("log", forever.wait).open)
    with pytest.raises(KeyboardInterrupt), tracking.mirror(tmp_path, Tracker("tensorboard", 3600), {}) as mirror:
        mirror.log(0, {})
        raise KeyboardInterrupt
    assert "did not finish within 0.1 s" in caplog.text


def test_the_next_run_of_a_sweep_is_not_touched_by_a_tracker_that_was_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gate, late = Event(), Event()

    def wait_and_fail() -> None:
        gate.wait()
        late.set()
        raise OSError("far too late")

    first, second = Fake("log", wait_and_fail), Fake()
    before = set(threading.enumerate())
    mirrored(monkeypatch, first, tmp_path / "a", 0, patience=0)
    (left,) = set(threading.enumerate()) - before
    mirrored(monkeypatch, second, tmp_path / "b", 0, 1)
    gate.set()
    left.join()
    assert second.rows == [0, 1] and second.codes == [0]
    assert late.is_set() and "far too late" not in caplog.text


@pytest.mark.timeout(300)
def test_a_run_with_a_bad_tracker_is_the_run_without_one(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forever: Event, ended: list[int]
) -> None:
    """Raising (over stages that are taken over), hanging (while they are made): the process ends at once."""
    straight = train(*QUICK, outputs=tmp_path / "there")
    cases = {
        "raising": (Fake("log", refuse), "the tracker failed (OSError: it is down)"),
        "hanging": (Fake("open", forever.wait), "the tracker did not finish within 0.1 s"),
    }
    for name, (fake, told) in cases.items():
        ended.clear()
        monkeypatch.setattr(tracking, "_unclosed", set())
        monkeypatch.setattr(tracking, "_open", fake.open)
        patience, outputs = ("0.1", "new") if name == "hanging" else ("60", "there")
        more = ["tracker=tensorboard", f"tracker.patience={patience}"]
        root = train(*QUICK, *more, name=name, outputs=tmp_path / outputs)
        assert (root / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
        assert ended == [0] and fake.rows == []
        log = (root / "run.log").read_text()
        assert told in log and log.count("WARNING spin_reg.tracking") == 1


def test_a_process_ends_though_its_tracker_and_its_hooks_hang(tmp_path: Path) -> None:
    code = (
        "import atexit, threading\nfrom pathlib import Path\nfrom spin_reg import tracking\n"
        "from spin_reg.settings import Tracker\nforever = threading.Event()\natexit.register(forever.wait)\n"
        "tracking._load = bool\ntracking._open = lambda *args: forever.wait()\n"
        "with tracking.mirror(Path(), Tracker('tensorboard', 0), {}):\n    print('worked')\n"
        "tracking.leave(7)\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=75, env=env)
    assert done.returncode == 7 and done.stdout == "worked\n" and "did not finish" in done.stderr


@pytest.mark.slow
def test_wandb_at_a_dead_address_neither_fails_nor_holds_the_process(tmp_path: Path) -> None:
    """Left to itself W&B waits 90 seconds at the exit."""
    words = [*TRACKED, f"outputs={tmp_path}", "run_name=run", "tracker.patience=1"]
    alone(tmp_path, "train", *words, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="0" * 40)
    assert "the tracker did not finish within 1 s" in (tmp_path / "run/run.log").read_text()
    assert (tmp_path / "run/iterate-02/evaluate/metrics.json").exists()


class StubRun(SimpleNamespace):
    """What `wandb.init` returns, as far as we use it."""

    offline, url, starting_step = False, "https://w.example/run", 2

    def __init__(self) -> None:
        super().__init__(sent=[], artifacts=[], codes=[])

    def define_metric(self, *args: str, **kwargs: str) -> None: ...

    def log(self, payload: dict[str, Any], step: int) -> None:
        self.sent.append(payload | {"_step": step})

    def log_artifact(self, artifact: str) -> None:
        self.artifacts.append(artifact)

    def finish(self, exit_code: int) -> None:
        self.codes.append(exit_code)


def test_wandb_gets_what_it_lacks_and_every_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, asked = StubRun(), {}

    class Artifact:
        def __init__(self, name: str, type: str) -> None:
            self.name = name

        def add_dir(self, folder: str) -> None:
            run.artifacts.append((self.name, Path(folder).parent.name))

    def init(**kwargs: Any) -> StubRun:
        asked.update(kwargs)
        return run

    stub = SimpleNamespace(init=init, Settings=dict, Artifact=Artifact, Table=lambda columns, data: (columns, data))
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(StubRun, "log_artifact", lambda self, artifact: None)
    for k in (0, 1):
        (tmp_path / f"iterate-{k:02d}/model").mkdir(parents=True)
    (tmp_path / "iterate-01/evaluate").mkdir()
    (tmp_path / "iterate-01/evaluate/samples.json").write_text('[{"prompt": "a", "text": "b"}]')
    judged = [{"iterate": 0, "eval/heldout_nll": 2.0}, {"iterate": 1, "eval/heldout_nll": 1.5, "eval/margin": 0.25}]
    rows = [judged[0], {"train/loss": 0.5}, {"train/loss": 0.4}, judged[1]]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = tracking.replay(tmp_path / "metrics.jsonl", Wandb(log_model=True), {"seed": 0})
    assert said == "2 of 4 rows sent to W&B, https://w.example/run"
    made = {"samples/iterate_01": (["prompt", "text"], [["a", "b"]])}
    columns = ["iterate", "eval/heldout_nll", "eval/margin"]  # those sent earlier stand in it too, and the best
    made |= {"iterates": (columns, [["0", 2.0, None], ["1", 1.5, 0.25], ["best", 1.5, None]])}
    steps = [{"step_in_all": i, "_step": i} for i in (2, 3)]
    assert run.sent == [{"train/loss": 0.4} | steps[0], judged[1] | steps[1] | made] and run.codes == [0]
    assert run.artifacts == [(f"{tmp_path.name}-iterate-{k:02d}", f"iterate-{k:02d}") for k in (0, 1)]
    assert asked["id"] == json.loads((tmp_path / "wandb.json").read_text())["id"] and asked["config"] == {"seed": 0}
    assert asked["mode"] is None and asked["reinit"] == "create_new"


def test_rows_that_come_late_have_later_steps_at_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation that is asked for afterwards stands between rows that W&B has; it takes what came of a killed run's
    rows from how far it got, and what an older version sent for the first rows."""
    there: list[dict[str, Any]] = []
    stub = SimpleNamespace(Settings=dict, Table=lambda columns, data: None)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)

    def sent(rows: list[dict[str, Any]], arrive: int = 99) -> str:
        run = StubRun()
        run.starting_step = len(there)
        stub.init = lambda **given: run
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        said = tracking.replay(tmp_path / "metrics.jsonl", Wandb(), {})
        for payload in run.sent[:arrive]:
            assert payload["_step"] == len(there)  # a smaller one would be dropped
            there.append({key: payload[key] for key in payload if key in ("train/loss", "eval/heldout_nll")})
        return said.partition(" rows")[0]

    losses = [{"step": i, "train/loss": i / 8} for i in range(4)]
    judged = [{"iterate": k, "eval/heldout_nll": k / 4} for k in range(2)]
    assert sent(losses, arrive=3) == "4 of 4"
    assert sent([judged[0], *losses, judged[1]], arrive=1) == "3 of 6"
    assert sent([judged[0], *losses, judged[1]]) == "2 of 6" and sent([judged[0], *losses, judged[1]]) == "0 of 6"
    given = [{key: row[key] for key in row if "/" in key} for row in (*losses[:3], judged[0], losses[3], judged[1])]
    assert there == given
    (tmp_path / "wandb.json").write_text(json.dumps({"id": "0" * 16}))  # as it was before rows stood in it
    more = {"step": 4, "train/loss": 1.0}
    assert sent([judged[0], *losses, judged[1], more]) == "1 of 7" and there[-1] == {"train/loss": 1.0}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "{}",
        "null",
        "[" * 100_000,
        *(f'{{"id": {text}}}' for text in ("5", '"x"', '"../../x"', '"0123456789ABCDEF"')),
    ],
)
def test_a_damaged_wandb_json_is_made_anew(content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "wandb.json").write_text(content)
    made = tracking.wandb_id(tmp_path)
    assert "wandb.json is damaged" in caplog.text
    caplog.clear()
    assert tracking.wandb_id(tmp_path) == made == json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert not caplog.messages


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf")])
def test_patience_is_checked(seconds: float) -> None:
    with pytest.raises(ValueError, match="tracker.patience="):
        Wandb(patience=seconds)


def test_the_first_id_is_made_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert tracking.wandb_id(tmp_path) == tracking.wandb_id(tmp_path)
    assert not caplog.messages


def recorded(folder: Path, *overrides: str) -> Path:
    """The folder of a run as `sync` sees it."""
    folder.mkdir()
    run = {"overrides": list(overrides), "cwd": str(folder.parent), "iterations": 1, "created": ""}
    durable.write_record(folder / "run.json", run | {key: {} for key in ("settings", "sources", "versions")})
    (folder / "metrics.jsonl").write_text('{"train/loss": 0.5}\n{"train/loss": 0.25}\n{"iterate": 1}\n')
    return folder


def test_sync_refuses_what_it_cannot_send(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: list[int]
) -> None:
    root = str(recorded(tmp_path / "run", "tracker=none"))
    monkeypatch.setattr(tracking, "_open", Fake("log", refuse).open)
    (tmp_path / "empty").mkdir()
    for words, code, told in [
        ([], 2, "Which run?"),
        ([str(tmp_path / "empty")], 2, "no run"),
        ([root], 2, f"spin-reg sync {root} tracker=wandb"),
        ([root, "tracker=wandb", "alpha=0.1"], 2, "alpha=0.1"),
        ([root, "tracker=wandb", "-m"], 2, "-m"),
        ([root, "tracker=wandb", "tracker.projekt=x"], 2, "tracker.project"),
        ([root, "tracker=tensorboard"], 1, "OSError: it is down"),
    ]:
        result = command("sync", *words)
        assert result.code == code and told in result.err, (words, result.err)
        assert len(result.err.splitlines()) == 4 and result.out == ""
    assert ended == [1]
    with rundir.owned(Path(root)):
        assert command("sync", root, "tracker=tensorboard").code == 4
    metrics = Path(root) / "metrics.jsonl"
    metrics.write_text('{"cut')
    with pytest.raises(DamagedError, match="metrics are damaged"):
        tracking.replay(metrics, Tracker("tensorboard"), {})
    metrics.unlink()
    with pytest.raises(ConfigError, match="no metrics"):
        tracking.replay(metrics, Tracker("tensorboard"), {})


def test_sync_sends_to_the_runs_own_tracker_or_to_another(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[str, Any, Any]] = []

    def opened(root: Path, tracker: Tracker, settings: dict[str, Any]) -> Fake:
        sent.append((root.name, tracker, settings["seed"]))
        return fake

    fake = Fake()
    monkeypatch.setattr(tracking, "_open", opened)
    monkeypatch.setattr(tracking, "_load", bool)
    root = recorded(tmp_path / "run", "seed=3", "tracker=wandb", "tracker.project=mine")
    for words, tracker in [
        ([], Wandb(project="mine")),
        (["tracker.project=yours"], Wandb(project="yours")),
        (["tracker=tensorboard"], Tracker("tensorboard")),
    ]:
        fake.rows.clear()
        result = command("sync", str(root), *words)
        assert result.code == 0 and result.out == "3 of 3 rows sent to the fake\n"
        assert sent[-1] == ("run", tracker, 3) and fake.rows == [0, 1, 2] and fake.codes[-1] == 0


def test_no_secret_reaches_the_run_folder(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "canary-5f2c")
    assert command("train", *SMALL, *QUICK, f"outputs={tmp_path}", "run_name=run").code == 0
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and b"canary-5f2c" in p.read_bytes()]


def test_tensorboard_through_accelerate_while_it_runs_and_by_sync(train: Train, command: Command) -> None:
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="an extra")
    root = train("tracker=tensorboard", *QUICK)
    rows = [(i, row["train/loss"]) for i, row in enumerate(read_jsonl(root / "metrics.jsonl")) if "train/loss" in row]
    for again in (False, True):
        if again:
            shutil.rmtree(root / "spin-reg")
            assert command("sync", str(root)).code == 0
        (events,) = (root / "spin-reg").glob("events.out.tfevents.*")
        read = loading.EventAccumulator(str(events))
        read.Reload()
        scalars = read.Scalars("train/loss")
        assert [e.step for e in scalars] == [i for i, _ in rows]
        assert [e.value for e in scalars] == pytest.approx([value for _, value in rows])
