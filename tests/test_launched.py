"""The command under torchrun: one process is the run and prints, the others take part; on one machine or on several."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Command
from test_processes import ANSWERS, AT_THE_SECOND_SHARD, SCORES, TRAP, WORDS, same, within

from spin_reg import launched as launcher
from spin_reg import processes
from spin_reg.errors import ConfigError
from spin_reg.settings import Hardware

pytestmark = pytest.mark.slow
ARMED = TRAP.replace('if "spin_reg.worker" in sys.orig_argv:', 'if "RANK" in os.environ:')
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@pytest.fixture(scope="module")
def made(undisturbed: Callable[..., Path]) -> Path:
    """The run, made in one process, that nothing disturbed."""
    return undisturbed(*WORDS)


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """The same, but for the answers and scores that iteration 0 trains on, which are still to be made."""
    found = tmp_path / "outputs/run"
    shutil.copytree(made, found)
    for folder in (ANSWERS, SCORES):
        shutil.rmtree(found / folder)
    return found


def launched(outputs: Path, *launcher: str, trap: str = "") -> "subprocess.Popen[str]":
    """The command under torchrun, with a trap in each rank; what it says on both streams comes as one."""
    traps = outputs.parent / "trap"
    traps.mkdir(exist_ok=True)
    (traps / "sitecustomize.py").write_text(ARMED + trap)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(traps), *sys.path]), "OMP_NUM_THREADS": "1"}
    words = [*TORCHRUN, *launcher, "-m", "spin_reg", "train", *WORDS, f"outputs={outputs}"]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_run_under_torchrun_holds_what_one_in_one_process_holds(made: Path, tmp_path: Path) -> None:
    process = launched(tmp_path, "--standalone", "--nproc-per-node", "2")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert same(tmp_path / "run", made)
    assert said.count("] iterate-00/answers/train-00") == said.count("\nmodel  ") == 1  # one prints


def test_two_nodes_on_a_shared_disk(made: Path, root: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    trap = f"""
    def shard(path, content):
        if "shards" in str(path):
            open({str(root.parent)!r} + "/rank-" + os.environ["RANK"], "a").write(path.name[:9] + "\\n")
    after(durable, "write_bytes", shard)
"""
    nodes = [launched(root.parent, *where, "--node-rank", str(i), trap=trap) for i in range(2)]
    said = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert same(root, made)
    assert "model  " in said[0] and "model  " not in said[1]
    assert len((root.parent / "rank-1").read_text().splitlines()) == 2  # of each stage the middle one of three


def test_a_signal_to_the_launcher_stops_all_and_the_command_goes_on_without_it(
    made: Path, root: Path, command: Command
) -> None:
    trap = "    after(durable, 'write_bytes', lambda path, content: time.sleep(2 * ('shards' in str(path))))\n"
    process = launched(root.parent, "--standalone", "--nproc-per-node", "2", trap=trap)
    assert within(60, lambda: bool(list(root.glob(f"{ANSWERS}.tmp/.scratch/shards-of-8/*.parquet"))))
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    said, _ = process.communicate(timeout=30)
    assert time.monotonic() - began < 15
    assert "Stopped by SIGTERM" in said and "stopped at once" not in said, said
    assert command("train", *WORDS, f"outputs={root.parent}").code == 0
    assert same(root, made)


def test_what_a_follower_raises_is_told_by_rank_0(root: Path) -> None:
    raised = "from spin_reg.errors import NonFiniteError as E; raise E('A what.', where='a', why='b', todo='c')"
    trap = AT_THE_SECOND_SHARD.replace("== 2", "== 1 and os.environ['RANK'] == '1'").replace("ACT", raised)
    process = launched(root.parent, "--standalone", "--nproc-per-node", "2", trap=trap)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "spin-reg: A what." in said
    assert "local_rank: 0" in said and "exitcode  : 5" in said
    assert "NonFiniteError" in (root / "run.log").read_text()


def test_settings_that_speak_of_other_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher._here, "world", 4)
    for settings in (Hardware(processes=3), Hardware(isolate=True)):
        with pytest.raises(ConfigError, match="a launcher has started 4"):
            processes.check(settings)
    processes.check(Hardware(processes=4))
    processes.check(Hardware())
