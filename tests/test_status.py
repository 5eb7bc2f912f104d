"""`status`, `ls` and `compare`: what they say is what the run folders hold."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from conftest import Command, Result

from spin_reg import opponents, rundir, survey
from spin_reg.opponents import Generator, Iterate, arithmetic, geometric
from spin_reg.pace import Piece

Swept = tuple[Path, Result]


def lines(text: str) -> list[dict[str, str]]:
    """A piped table by its columns."""
    first, *rest = text.splitlines()
    return [dict(zip(first.split("\t"), line.split("\t"), strict=True)) for line in rest]


def runs(place: Path) -> list[Path]:
    return sorted(path.parent for path in place.glob("*/run.json"))


@pytest.fixture
def copied(swept: Swept, tmp_path: Path) -> Path:
    """Two of the runs, to be changed."""
    for root in runs(swept[0])[2:]:
        shutil.copytree(root, tmp_path / "o" / root.name)
    return tmp_path / "o"


def test_formulas_of_references() -> None:
    pi = [Iterate(k) for k in range(3)]
    assert opponents.formula(pi[1]) == "log pi_1"
    assert opponents.formula(geometric([(0.5, pi[0]), (0.5, pi[1])])) == "0.5 log pi_1 + 0.5 log pi_0"
    both = arithmetic([(0.5, pi[1]), (0.5, pi[2])])
    assert opponents.formula(both) == "log(0.5 pi_2 + 0.5 pi_1)"
    nested = geometric([(0.25, pi[0]), (0.75, both)])
    assert opponents.formula(nested) == "0.25 log pi_0 + 0.75 log(0.5 pi_2 + 0.5 pi_1)"
    inside = arithmetic([(0.5, pi[2]), (0.5, geometric([(0.5, pi[0]), (0.5, pi[1])]))])
    assert opponents.formula(inside) == "log(0.5 pi_2 + 0.5 exp(0.5 log pi_1 + 0.5 log pi_0))"
    assert opponents.formula(Generator((0, 1))) == "log pi_k, k the one that answered"


def test_finished_runs_and_the_family_of_one(swept: Swept, command: Command) -> None:
    place, _ = swept
    rows = lines(command("status", str(place)).out)
    assert [row["run"] for row in rows] == [root.name for root in runs(place)] and len(rows) == 4
    for row, root in zip(rows, runs(place), strict=True):
        made = len([p for p in root.rglob("stage.json")])
        assert (row["state"], row["iterates"], row["stages"]) == ("finished", "3/3", f"{made}/{made}")
        values = json.loads((root / "iterate-02/evaluate/metrics.json").read_text())
        assert row["heldout_nll"] == f"{values['eval/heldout_nll']:.3f}"
    plain, mixed = runs(place)[0], runs(place)[2]
    (found,) = json.loads(command("status", str(mixed), "--json").out)["runs"]
    disk = sum(p.stat().st_size for p in mixed.rglob("*") if p.is_file())
    shared = sum(p.stat().st_size for p in mixed.rglob("*") if p.is_file() and p.stat().st_nlink > 1)
    assert (found["disk"], found["shared"]) == (disk, shared) and shared > 0
    tree = found["tree"]
    assert [m["reference"] for m in tree] == [None, "log pi_0", "0.5 log pi_1 + 0.5 log pi_0"]
    assert [m["answers"] for m in tree] == [{}, {"0": 1.0}, {"1": 1.0}] and [m["parent"] for m in tree] == [None, 0, 1]
    taken = {name for m in tree for name in m["reused"].get(plain.name, [])}
    told = set(re.findall(r"(\S+): taken from", (mixed / "run.log").read_text()))
    assert taken | {"data"} == told and {"iterate-00/sft", "iteration-00/train"} <= taken
    (other,) = json.loads(command("status", str(plain), "--json").out)["runs"]
    assert other["tree"][2]["reference"] == "log pi_1" and other.keys() == found.keys()
    assert "0.5 log pi_1 + 0.5 log pi_0" in command("status", str(mixed)).out


def at_work(root: Path, log: str) -> None:
    """Make a finished run one whose last training is going on, in this process."""
    shutil.rmtree(root / "iterate-02")
    (root / "iterate-02/model.tmp").mkdir(parents=True)
    (root / "run.log").write_text(log)
    survey.record(
        root,
        [Piece("iteration-00/train", "train", "iterate-01/model", 60)]
        + [
            Piece("iteration-01/train", "train", "iterate-02/model", 120),
            Piece("iterate-02/evaluate", "evaluate", "iterate-02/evaluate", 0),
        ],
    )


LOG = """t INFO spin_reg.runner: iteration-00/train: todo (not made yet)
t INFO spin_reg.runner: iteration-00/train: took {"seconds": 30.0}
t INFO spin_reg.runner: iteration-01/train: todo (not made yet)
"""
AT = (
    't INFO spin_reg.context: iteration-01/train: at {"done": 5, "total": 12, "since": 2, "seconds": 6.0, '
    '"unit": "step"}\n'
)


def test_a_run_at_work(copied: Path, command: Command) -> None:
    """60 tokens took 30 s, so 120 take 60; once it tells: 3 steps took 6 s, so 7 are 14."""
    root = runs(copied)[0]
    at_work(root, LOG)
    with rundir.owned(root):
        _seen_at_work(root, copied, command)
    (root / ".owner.json").write_text(json.dumps({"host": "elsewhere", "pid": os.getpid(), "since": 0}))  # a killed one
    assert lines(command("status", str(copied)).out)[0]["state"] == "interrupted"
    for kind, state in (("NonFiniteError", "failed"), ("Stopped", "stopped")):
        said = f"t ERROR spin_reg.launch: the run ended early: {kind}: It went wrong there\nTraceback\n  all\n"
        (root / "run.log").write_text(LOG + AT + said)
        row = lines(command("status", str(copied)).out)[0]
        assert (row["state"], row["error"]) == (state, "It went wrong there")
        (root / "run.log").write_text(LOG + AT + said + LOG)
        assert lines(command("status", str(copied)).out)[0]["state"] == "interrupted"


def _seen_at_work(root: Path, copied: Path, command: Command) -> None:
    row = lines(command("status", str(copied)).out)[0]
    assert row["state"].startswith("running") and str(os.getpid()) in row["state"]
    assert (row["stages"], row["at work"], row["left"], row["iterates"]) == ("1/3", "iteration-01/train", "60 s", "2/3")
    generate = Piece("iterate-02/answers/heldout", "generate", "iterate-02/answers/heldout", 5)
    survey.record(root, [*(Piece(**piece) for piece in json.loads((root / ".plan.json").read_text())), generate])
    assert lines(command("status", str(copied)).out)[0]["left"] == "> 60 s"  # no answers were timed yet
    survey.record(root, [Piece(**piece) for piece in json.loads((root / ".plan.json").read_text())][:-1])
    (root / "run.log").write_text(LOG + AT)
    row = lines(command("status", str(copied)).out)[0]
    assert (row["at work"], row["rate"], row["left"]) == ("iteration-01/train 5/12 step", "0.5/s", "14 s")
    tree = json.loads(command("status", str(root), "--json").out)["runs"][0]["tree"]
    assert tree[2]["made"] == "at work" and tree[2]["reference"] == "0.5 log pi_1 + 0.5 log pi_0"


def test_what_is_broken_or_strange_is_named_and_hides_nothing(copied: Path, command: Command) -> None:
    first, second = runs(copied)
    (second / "run.json").write_text("{")
    (first / ".plan.json").write_text('[{"from": "a later version"}]')
    (first / "iterate-01/evaluate/metrics.json").chmod(0o644)
    (first / "iterate-01/evaluate/metrics.json").write_text("{}")
    (first / "new.bin").write_bytes(b"\xff")
    (first / "loop").symlink_to(first)
    (copied / "no-run").mkdir()
    rows = lines(command("status", str(copied)).out)
    assert [row["state"] for row in rows] == ["finished", "damaged"] and "run.json" in rows[1]["error"]
    assert command("status", str(first)).code == 0
    listed = lines(command("ls", str(copied)).out)
    assert [row["problem"] != "" for row in listed] == [False, True] and listed[0]["iterates"] == "2"
    result = command("compare", str(first), str(second))
    assert result.code == 1 and "run.json" in result.err


def test_watching_goes_on_until_ctrl_c(swept: Swept, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    result = command("status", str(swept[0]), "--watch", "--json")
    assert result.code == 0 and waited == [2.0] * 3
    assert [len(json.loads(line)["runs"]) for line in result.out.splitlines()] == [4] * 3


@pytest.mark.parametrize("verb", ["status", "ls", "compare"])
def test_manuals_and_refusals(verb: str, command: Command, tmp_path: Path) -> None:
    shown = command(verb, "--help")
    assert shown.code == 0 and "EXAMPLES" in shown.out and f"spin-reg {verb}" in shown.out
    assert max(map(len, shown.out.splitlines())) <= 120
    for words in (["--nonsense"], [str(tmp_path / "nowhere")] * (1 + (verb == "compare"))):
        result = command(verb, *words)
        assert result.code == 2 and len(result.err.splitlines()) == 4
    assert verb in command("--help").out


def test_ls_lists_what_sets_runs_apart(swept: Swept, command: Command) -> None:
    place, _ = swept
    rows = lines(command("ls", str(place)).out)
    assert [row["settings"] for row in rows] == [f"alpha={a} seed={s}" for a in ("0", "0.5") for s in (0, 1)]
    chosen = lines(command("ls", str(place), "alpha=5e-1", "regularizer=kl", "schedule.learning_rate=0.01").out)
    assert [row["run"] for row in chosen] == [rows[2]["run"], rows[3]["run"]]
    assert "no such runs" in command("ls", str(place), "seed=7").out
    assert command("ls", str(place), "sede=7").code == 2
    listed = json.loads(command("ls", str(place), "seed=1", "--json").out)["runs"]
    assert [run["settings"]["seed"] for run in listed] == [1, 1]
    nll = {k: values["eval/heldout_nll"] for k, values in listed[0]["metrics"].items()}
    best = min(nll, key=lambda k: nll[k])
    assert rows[1]["best"] == f"{nll[best]:.3f} ({best})"


def metric(root: Path, k: int, name: str) -> Any:
    return json.loads((root / f"iterate-{k:02d}/evaluate/metrics.json").read_text())[f"eval/{name}"]


def test_two_sets_of_seeds_beside_each_other(swept: Swept, command: Command) -> None:
    place, _ = swept
    sides = [f"{place}/*alpha0-*", f"{place}/*alpha0.5-*"]
    found = json.loads(command("compare", *sides, "--metric", "kl_data", "--json").out)
    assert found["settings"] == {"alpha": {"a": "0", "b": "0.5"}}
    assert [row["iterate"] for row in found["metrics"]] == [0, 1, 2]
    a, b = ([metric(root, 2, "kl_data") for root in some] for some in (runs(place)[:2], runs(place)[2:]))
    last = found["metrics"][2]
    assert last["a"] == pytest.approx({"mean": fmean(a), "sd": stdev(a), "n": 2})
    gains = [y - x for x, y in zip(a, b, strict=True)]
    assert last["difference"] == pytest.approx({"mean": fmean(gains), "sd": stdev(gains), "n": 2})
    assert found["metrics"][1]["difference"] == {"mean": 0.0, "sd": 0.0, "n": 2}  # iteration 0 is the same
    rows = found["samples"]["rows"]
    assert found["samples"]["iterates"] == [2, 2] and rows
    for root, key in ((runs(place)[0], "a"), (runs(place)[2], "b")):
        kept = json.loads((root / "iterate-02/evaluate/samples.json").read_text())
        assert [(s["prompt"], s["real"], s["generated"]) for s in kept] == [
            (r["prompt"], r["real"], r[key]) for r in rows
        ]
    each = json.loads(command("compare", *sides, "--iterate", "best", "--by", "kl_off", "--json").out)["samples"]
    assert each["iterates"] == [min(range(3), key=lambda k: metric(runs(place)[i], k, "kl_off")) for i in (0, 2)]
    text = command("compare", *sides).out
    assert "# metrics" in text and "kl_off\t2\t" in text and text.count("*") == len(re.findall(r"\d\*", text))
    better = next(line for line in text.splitlines() if line.startswith("kl_data\t2\t")).split("\t")
    assert better[2].endswith("*") == (fmean(a) < fmean(b)) != better[3].endswith("*")
    one = next(place.glob("*alpha0.5-seed0-*"))
    text = command("compare", sides[0], str(one), "--metric", "kl_data").out
    equal = next(line for line in text.splitlines() if line.startswith("kl_data\t1\t")).split("\t")
    assert equal[4:] == ["0", "1"] and "*" not in equal[2] + equal[3]  # whatever the other seed's mean is
    some = [f"{place} alpha=0", f"{place}/* alpha=0.50"]
    assert json.loads(command("compare", *some, "--metric", "kl_data", "--json").out)["metrics"] == found["metrics"]
    result = command("compare", f"{place} alpha=7", sides[0])
    assert result.code == 2 and "none there has alpha=7" in result.err
    result = command("compare", str(place), sides[0])
    assert "alpha=0'" in result.err
    assert result.code == 2 and "alpha: 0, 0.5" in result.err
    assert command("compare", *sides, "--metric", "nonsense").code == 2


def test_nothing_of_it_loads_torch_and_fifty_runs_are_quick(swept: Swept, tmp_path: Path) -> None:
    root = runs(swept[0])[3]
    for i in range(50):
        shutil.copytree(root, tmp_path / f"run{i:02d}", copy_function=os.link)
    code = "import sys, spin_reg.cli as c\nsys.argv = ['spin-reg', 'status', sys.argv[1]]\ntry: c.main()\n"
    code += "except SystemExit: print([m for m in ('torch', 'hydra', 'pyarrow') if m in sys.modules])"
    took = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert done.stdout.splitlines()[-1] == "[]" and len(done.stdout.splitlines()) == 52
    assert min(took) < 1.0, took  # 0.3 s of a core
