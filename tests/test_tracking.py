"""Trackers mirror metrics.jsonl and can never hurt a run."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, Command, read_jsonl

from spin_reg import tracking
from spin_reg.settings import Tracker


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


def offline(tmp_path: Path, *words: str) -> None:
    """The command in a process of its own, with no key and the home folder of nobody."""
    code = f"import sys\nfrom spin_reg import cli\nsys.argv = ['spin-reg', *{list(words)!r}]\ncli.main()"
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


def history(folder: Path) -> list[dict[str, Any]]:
    """The history rows of an offline run."""
    records = [record.history for record in wandb_records(folder) if record.HasField("history")]
    return [{".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.item} for record in records]


def test_wandb_offline_holds_every_row_the_samples_the_settings_and_the_models(tmp_path: Path) -> None:
    words = [word for word in SMALL if not word.startswith("tracker")]
    offline(tmp_path, "train", *words, "tracker.log_model=true", f"outputs={tmp_path}", "run_name=run")
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


@pytest.mark.slow
def test_wandb_offline_after_a_resume_holds_the_whole_history_under_one_id(tmp_path: Path) -> None:
    """W&B's own resume does nothing offline, so each process replays metrics.jsonl with its steps."""
    words = [word for word in SMALL if not word.startswith("tracker")]
    offline(tmp_path, "train", *words, f"outputs={tmp_path}", "run_name=run", "schedule.iterations=1")
    offline(tmp_path, "resume", str(tmp_path / "run"), "schedule.iterations=2")
    rows = read_jsonl(tmp_path / "run/metrics.jsonl")
    folders = sorted((tmp_path / "run/wandb").glob("offline-run-*"), key=lambda p: p.stat().st_mtime)
    assert len(folders) == 2 and len({folder.name.rpartition("-")[2] for folder in folders}) == 1
    assert [item["_step"] for item in history(folders[-1])] == list(range(len(rows)))


class Broken:
    def __init__(self) -> None:
        self.calls = 0

    def log(self, index: int, row: dict[str, Any]) -> None:
        self.calls += 1
        raise OSError("the tracker is down")

    def close(self, exit_code: int) -> None:
        raise OSError("still down")


def test_a_broken_tracker_is_asked_once_and_the_run_goes_on(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = train(outputs=tmp_path / "a")
    broken = Broken()
    monkeypatch.setattr(tracking, "_open", lambda *args: broken)
    root = train(outputs=tmp_path / "b")
    assert broken.calls == 1
    assert (root / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    assert "the tracker failed (OSError: the tracker is down)" in (root / "run.log").read_text()


class Recorder(tracking.NoMirror):
    def __init__(self) -> None:
        self.rows: list[int] = []
        self.closed: list[int] = []

    def log(self, index: int, row: dict[str, Any]) -> None:
        self.rows.append(index)

    def close(self, exit_code: int) -> None:
        self.closed.append(exit_code)


def test_every_row_is_sent_once_and_the_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(tracking, "_open", lambda *args: recorder)
    with tracking.mirror(tmp_path, Tracker(), {}) as mirror:
        for index in (0, 1, 1, 0, 2):
            mirror.log(index, {})
    with pytest.raises(KeyboardInterrupt), tracking.mirror(tmp_path, Tracker(), {}):
        raise KeyboardInterrupt
    assert recorder.rows == [0, 1, 2] and recorder.closed[0] == 0 and recorder.closed[1] != 0


def test_no_secret_reaches_the_run_folder(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "canary-5f2c")
    assert command("train", *SMALL, f"outputs={tmp_path}", "run_name=run").code == 0
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and b"canary-5f2c" in p.read_bytes()]


def test_tensorboard_through_accelerate(train: Callable[..., Path]) -> None:
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="an extra")
    root = train("tracker=tensorboard")
    (events,) = (root / "spin-reg").glob("events.out.tfevents.*")
    read = loading.EventAccumulator(str(events))
    read.Reload()
    rows = [row for row in read_jsonl(root / "metrics.jsonl") if "train/loss" in row]
    assert [e.value for e in read.Scalars("train/loss")] == pytest.approx([row["train/loss"] for row in rows])
