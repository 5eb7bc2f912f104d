"""What is ours of a machine: cores a process is bound to, and limits of control groups as files of both versions."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL, Command

from spin_reg import machine, processes
from spin_reg.settings import Hardware
from spin_reg.space import human

GIB = 2**30


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine of eight cores and 24 GiB without control groups; `group` makes some."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    sysconf, pages = os.sysconf, 24 * GIB // os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(os, "sysconf", lambda name: pages if name == "SC_PHYS_PAGES" else sysconf(name))
    monkeypatch.setattr(machine, "OWN", tmp_path / "own")
    monkeypatch.setattr(machine, "GROUPS", tmp_path / "groups")


def group(path: str, **files: str) -> None:
    for name, text in files.items():
        file = machine.GROUPS / path / name.replace("__", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")


def test_without_control_groups_it_is_what_the_process_is_bound_to() -> None:
    assert machine.cores() == 8 and machine.memory() == 24 * GIB and machine.threads() is None


@pytest.mark.parametrize("own", ["0::/a/b\n", "0::/\n", "0::/elsewhere/outside/the/container\n"])
def test_the_least_of_all_groups_around_counts(own: str) -> None:
    machine.OWN.write_text(own)
    group(".", cpu__max="600000 100000", memory__max=str(20 * GIB))
    group("a", cpu__max="250000 100000", memory__max="max")
    group("a/b", cpu__max="max 100000", memory__max=str(4 * GIB))
    inside = own == "0::/a/b\n"
    assert machine.cores() == (3 if inside else 6)  # 2.5 cores are three threads, of which one waits at times
    assert machine.memory() == (4 if inside else 20) * GIB


@pytest.mark.parametrize("path", ["/job", "/docker/0123"])
def test_the_files_of_version_1(path: str) -> None:
    machine.OWN.write_text(f"12:cpu,cpuacct:{path}\n5:memory:{path}\n4:freezer:/\n1:name=systemd:/x\n")
    top = "" if path == "/docker/0123" else path  # in a container its own group is the top
    group(f"cpu{top}", cpu__cfs_quota_us="150000", cpu__cfs_period_us="100000")
    group("cpu", cpu__shares="1024")
    group(f"memory{top}", memory__limit_in_bytes=str(3 * GIB))
    assert machine.cores() == 2 and machine.memory() == 3 * GIB
    group(f"cpu{top}", cpu__cfs_quota_us="-1")
    group(f"memory{top}", memory__limit_in_bytes="9223372036854771712")  # no limit
    assert machine.cores() == 8 and machine.memory() == 24 * GIB


@pytest.mark.parametrize(("said", "found"), [("3", 3), ("4,2", 4), ("", None), ("0", None), ("many", None)])
def test_threads_are_what_was_asked_for_then_what_the_environment_says_then_a_share_of_the_cores(
    said: str, found: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert machine.threads() == found
    for count, each in [(1, 8), (2, 4), (3, 2), (16, 1)]:
        assert processes.threads(Hardware(processes=count)) == (found or each)
    assert processes.threads(Hardware(processes=4, threads=5)) == 5


def test_the_command_keeps_to_it(command: Command, tmp_path: Path) -> None:
    """The plan's threads, and whether a run will fit into memory."""
    words = ["plan", *(word for word in SMALL if "threads" not in word), f"outputs={tmp_path / 'outputs'}"]
    assert f"{human(24 * GIB)} of RAM" in command(*words).out
    machine.OWN.write_text("0::/\n")
    group(".", cpu__max="200000 100000", memory__max=str(100 * 2**20))
    assert json.loads(command(*words, "--json").out)["threads"] == 2
    assert "It will not fit" in command(*words).out


@pytest.mark.skipif(sys.platform != "linux", reason="taskset is of Linux")
def test_a_process_that_is_bound_to_one_core_takes_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert machine.cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("cpuinfo", "found"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16\n\nprocessor\t: 1\nflags\t\t: fpu\n", True),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd svebf16 bf16\n", True),
        ("flags\t\t: fpu avx512f avx512vl\n", False),
        ("model name\t: a CPU that says nothing\n", None),
        (None, None),
    ],
)
def test_whether_a_cpu_multiplies_bfloat16(
    cpuinfo: str | None, found: bool | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "CPU", tmp_path / "cpuinfo")
    if cpuinfo is not None:
        machine.CPU.write_text(cpuinfo)
    assert machine.bfloat16() is found


@pytest.mark.parametrize("word", ["hardware.precision=bf16", "model.dtype=bfloat16"])
@pytest.mark.parametrize("able", [True, False, None])
def test_a_run_tells_that_bfloat16_is_slow_here(
    word: str, able: bool | None, monkeypatch: pytest.MonkeyPatch, command: Command, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "bfloat16", lambda: able)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told = command("plan", "--prepare", *SMALL, f"outputs={tmp_path / 'outputs'}", word).err
    assert (f"{word}: this CPU has no instructions for bfloat16" in told) == (able is False)
    assert ("weights that train keep 8 bits" in told) == (word == "model.dtype=bfloat16")
