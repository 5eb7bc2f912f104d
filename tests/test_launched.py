"""The command under torchrun: one process is the run and prints, the others take part; on one machine or on several."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, read_jsonl
from safetensors.torch import load_file
from test_processes import ANSWERS, AT_THE_SECOND_SHARD, MODEL, SCORES, TRAP, WORDS, same, within

from spin_reg import iterates
from spin_reg import launched as _launched

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


def near(root: Path, made: Path) -> None:
    """The same answers; metrics and weights up to what sums of gradients in another order round."""
    ids = [
        pq.read_table(run / "iteration-00/pairs.parquet").column("generated_ids").to_pylist() for run in (root, made)
    ]
    assert ids[0] == ids[1]
    for one, other in zip(*(read_jsonl(run / "metrics.jsonl") for run in (root, made)), strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-5)
    ours, theirs = (load_file(run / "iterate-01/model/model.safetensors") for run in (root, made))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-6)


def test_a_run_under_torchrun_holds_what_one_in_one_process_holds(made: Path, tmp_path: Path) -> None:
    process = launched(tmp_path, "--standalone", "--nproc-per-node", "2")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    near(tmp_path / "run", made)
    assert said.count("] iterate-00/answers/train-00") == said.count("\nmodel  ") == 1  # one prints


def test_a_plan_under_torchrun_is_printed_once_and_counts_its_processes(tmp_path: Path) -> None:
    words = ["-m", "spin_reg", "plan", *WORDS, f"outputs={tmp_path}", "hardware.sharding=full"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    said = []
    for more in ([], ["--json"]):
        several = [*TORCHRUN, "--standalone", "--nproc-per-node", "3", *words, *more]
        ended = subprocess.run(several, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        said.append(ended.stdout)
    shown, found = said[0], json.loads(said[1])
    assert shown.count("\n  processes: 3 for") == shown.count("in each of 3 processes (") == shown.count("run ") == 1
    assert found["processes"] == 3
    asked = [sys.executable, *words, "hardware.processes=3"]
    ended = subprocess.run([*asked, "--json"], env=environment, capture_output=True, text=True)
    asked_for = json.loads(ended.stdout)
    assert {**asked_for, "free": None} == {**found, "free": None}


NODES = """#!/bin/bash
shift  # --kill-on-bad-exit
trap 'kill -TERM $(cat /proc/$one/task/$one/children /proc/$two/task/$two/children) $one $two
  wait $one $two; exit 143' TERM
"$@" & one=$!
"$@" & two=$!
wait $one $two
"""  # srun, on two nodes that are one machine: all processes of a job have its signals
DEALT = """
    def shard(path, content):
        if "shards" in str(path):
            open(os.environ["DEALT"] + os.environ["RANK"], "a").write(path.name[:9] + "\\n")
            time.sleep(float(os.environ["SLOW"]))
    after(durable, "write_bytes", shard)
"""


@pytest.fixture
def job(root: Path, tmp_path: Path) -> Callable[..., "subprocess.Popen[str]"]:
    """scripts/nodes.sbatch in a job of two nodes that are one machine."""
    requeued, traps = tmp_path / "requeued", tmp_path / "trap"
    traps.mkdir()
    (traps / "sitecustomize.py").write_text(ARMED + DEALT)
    fakes = {"srun": NODES, "scontrol": f'#!/bin/sh\n[ $1 = show ] && echo 127.0.0.1 || echo "$@" > {requeued}\n'}
    fakes["torchrun"] = "#!/bin/sh\n[ $TORCH_ELASTIC_SHUTDOWN_TIMEOUT -gt 100 ] || exit 9\n"
    fakes["torchrun"] += f'exec {sys.executable} -m torch.distributed.run "$@"\n'
    for name, text in fakes.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def submit(slow: float) -> "subprocess.Popen[str]":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        environment |= {"SLURM_JOB_ID": "17", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
        environment |= {"PORT": str(port), "SLOW": str(slow), "DEALT": str(tmp_path / "rank-")}
        environment["PYTHONPATH"] = os.pathsep.join([str(traps), *sys.path])
        words = ["bash", str(ROOT / "scripts/nodes.sbatch"), "train", *WORDS, f"outputs={root.parent}"]
        return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return submit


def test_a_job_on_two_nodes_holds_what_one_process_holds_and_requeues_itself_when_its_time_is_up(
    made: Path, root: Path, job: Callable[..., "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    first = job(slow=2)
    assert within(60, lambda: bool(list(root.glob(f"{ANSWERS}.tmp/.scratch/shards-of-8/*.parquet"))))
    first.send_signal(signal.SIGUSR1)
    said, _ = first.communicate(timeout=40)
    assert first.returncode != 0 and said.count("spin-reg: Stopped by SIGTERM") == 1, said
    assert "stopped at once" not in said  # torchrun passes a signal on that Slurm sends to all processes anyway
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"
    (tmp_path / "requeued").unlink()
    second = job(slow=0)
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 0 and said.count("\nmodel  ") == 1, said
    assert same(root, made)
    assert not (tmp_path / "requeued").exists()
    dealt = {int(path.name[-1]): path.read_text().split() for path in tmp_path.glob("rank-*")}
    assert set(dealt) == {0, 1} and sorted(dealt[0] + dealt[1]) == sorted(["000000000", "000000008", "000000016"] * 2)


def test_what_a_follower_raises_is_told_by_rank_0(root: Path) -> None:
    raised = "from spin_reg.errors import NonFiniteError as E; raise E('A what.', where='a', why='b', todo='c')"
    trap = AT_THE_SECOND_SHARD.replace("== 2", "== 1 and os.environ['RANK'] == '1'").replace("ACT", raised)
    process = launched(root.parent, "--standalone", "--nproc-per-node", "2", trap=trap)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "spin-reg: A what." in said
    assert "local_rank: 0" in said and "exitcode  : 5" in said
    assert "NonFiniteError" in (root / "run.log").read_text()


def test_a_follower_that_fails_while_it_trains_leaves_nobody_waiting(root: Path) -> None:
    shutil.rmtree(root / MODEL)
    trap = """
    def fails(state, row):
        if row["step"] == 2 and os.environ["RANK"] == "1":
            raise RuntimeError("out of memory")
    after(fit._State, "update", fails)
"""
    process = launched(root.parent, "--standalone", "--nproc-per-node", "2", trap=trap)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "RuntimeError: out of memory" in said, said
    assert "rank 1 of 2" in (root / "run.log").read_text()


def test_followers_drop_their_model_where_another_program_wants_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Store(dict[str, str]):
        def set(self, key: str, value: str) -> None:
            self[key] = value

    dropped: list[int] = []
    monkeypatch.setattr(iterates, "forget", lambda: dropped.append(1))
    told = _launched._Launched(world=2, store=Store())
    monkeypatch.setattr(_launched, "_here", told)
    _launched.make_room()
    assert told.jobs == 1
    _launched._take_part(0)
    assert dropped == [1]
