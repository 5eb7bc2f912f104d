"""Kill it, fill its disk, flip its bytes: then the same command must end at the same bytes. Prints what was survived.

    python scripts/torture.py faults --points 25         calls of the helpers that write die, or fail as a full disk
    python scripts/torture.py damage                     one byte flipped, and four cut off, in every file of a run
    python scripts/torture.py killer --minutes 10        signals at random times over all four regularizers
    python scripts/torture.py all --points 0             all three, the first at every call; an hour

`--model FOLDER --data FILE.jsonl` adds a pretrained model with 16 prompts to the killer's arms.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from faults import Counter, before_calls  # noqa: E402

TINY = [
    *("tracker=none", "model.hidden_size=16", "model.num_layers=1", "model.num_heads=2", "model.sft.epochs=1"),
    *("model.sft.learning_rate=1e-2", "dataset.num_prompts=24", "dataset.num_heldout=8", "schedule.batch_size=8"),
    *("schedule.learning_rate=1e-2", "schedule.iterations=3", "schedule.save_every=2", "hardware.threads=1"),
    "run_name=run",
]
FICTITIOUS = [*TINY, "regularizer=fictitious_play"]
CUT = [*FICTITIOUS, "evaluation=none"]  # cut at every point in half the time; evaluation is in the other two
ARMS = {
    "none": [*TINY, "regularizer=none"],
    "kl": [*TINY, "alpha=0.5"],
    "fictitious_play": FICTITIOUS,
    "mixture_of_two": [*TINY, "regularizer=mixture_of_two"],
    "fictitious_play-union": [*FICTITIOUS, "regularizer.pairs=union"],
}
APART = ("run.json", "run.log", "config.yaml", "report.html", ".lock", ".owner.json")  # hold times
SOURCES = ("model/", "run.json")  # what is refused where it is damaged; the rest is made again


def tree(root: Path) -> dict[str, str]:
    """SHA-256 of every file of a run that equal runs must share."""
    files = (p for p in sorted(root.rglob("*")) if p.is_file() and p.name not in APART)
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def forked(words: Sequence[str], place: Path, trap: Callable[[], object] = lambda: None) -> tuple[int, str]:
    """`spin-reg train WORDS` in a child of this process, which has the libraries loaded; its exit code and stderr.

    A child that signal 9 ends gives -9.
    """
    place.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        try:
            told = os.open(place / "stderr", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.dup2(told, 1)
            os.dup2(told, 2)
            from spin_reg import cli

            sys.argv = ["spin-reg", "train", *words, f"outputs={place / 'outputs'}"]
            trap()
            cli.main()
        except SystemExit as end:
            sys.stderr.flush()
            os._exit(int(end.code or 0))
        finally:
            os._exit(99)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), (place / "stderr").read_text(errors="replace")


def load() -> None:
    """Import what a run imports, once, before the forks; nothing is computed here, so no thread pool is begun."""
    import datasets  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    from spin_reg.stages import base, evaluate, generate, pairs, prepare, score, sft, train  # noqa: F401

    torch.set_num_threads(1)


def straight(words: Sequence[str], place: Path) -> Path:
    """The uninterrupted run."""
    code, told = forked(words, place)
    assert code == 0, told
    return place / "outputs" / "run"


_traps: list[object] = []  # a context manager that nothing holds would be left at once


def cut(counter: Counter) -> None:
    """Have this process meet the counter's fault."""
    manager = before_calls(counter)
    manager.__enter__()
    _traps.append(manager)


def faults(points: int, seed: int, scratch: Path) -> str:
    """Cut a three-iteration run at calls of the helpers that write; the same command must go on to the same bytes."""
    whole = tree(straight(CUT, scratch / "straight"))
    counted = scratch / "count"

    def count() -> None:
        from spin_reg import cli

        counter = Counter()
        cut(counter)
        real, page, calls = cli.main, cli.page_after, []

        def paging(roots: list[Path]) -> None:
            calls.append(counter.calls)
            page(roots)
            calls.append(counter.calls)

        def noting() -> None:
            try:
                real()
            finally:
                (counted / "calls").write_text(json.dumps([*calls, counter.calls]))

        cli.main, cli.page_after = noting, paging

    forked(CUT, counted, count)
    before, done, calls = json.loads((counted / "calls").read_text())
    every = [(k, fault) for k in range(1, calls + 1) for fault in ("kill", "ENOSPC", "EIO")]
    chosen = every if points == 0 else random.Random(seed).sample(every, points)
    print(f"seed {seed}: {len(chosen)} of {len(every)} points ({calls} calls, three faults)", flush=True)

    def one(point: tuple[int, str]) -> str:
        k, fault = point
        place = scratch / f"cut-{k}-{fault}"
        code, told = forked(CUT, place, lambda: cut(Counter(at=k, fault=fault)))
        wanted = {"kill": -9, "ENOSPC": 6, "EIO": 1}
        if before < k <= done:  # the run is whole, whatever becomes of its page; why there is none is told
            wanted |= {"ENOSPC": 0, "EIO": 0}
            assert fault == "kill" or "to do: " in told, f"{fault} at {k}: nothing was told\n{told}"
        assert code == wanted[fault], f"{fault} at {k}: exit {code}\n{told}"
        code, told = forked(CUT, place)
        assert code == 0, f"{fault} at {k}, then: exit {code}\n{told}"
        found = tree(place / "outputs" / "run")
        assert (place / "outputs" / "run" / "report.html").is_file(), f"{fault} at {k}: there is no page"
        assert found == whole, f"{fault} at {k}: {[name for name in whole if found.get(name) != whole[name]]}"
        shutil.rmtree(place)
        return fault

    tally = Tally(parallel(one, chosen))
    return f"faults injected: {dict(tally)} at calls of the durable helpers ({calls} in the run); all survived"


def parallel(work: Callable[[tuple[int, str]], str], points: Sequence[tuple[int, str]]) -> Iterator[str]:
    """Map over forked workers, one a core that is ours."""
    import multiprocessing

    from spin_reg import machine

    global _work
    _work = work
    with multiprocessing.get_context("fork").Pool(machine.cores(), maxtasksperchild=None) as pool:
        for i, result in enumerate(pool.imap_unordered(_call, points), start=1):
            if i % 100 == 0:
                print(f"  {i} of {len(points)}", flush=True)
            yield result


_work: Callable[[tuple[int, str]], str]


def _call(point: tuple[int, str]) -> str:
    return _work(point)


def damage(seed: int, scratch: Path) -> str:
    """Hurt each file of a finished run and ask for one more iteration."""
    longer = [*FICTITIOUS, "schedule.iterations=4"]
    words = [word for word in longer if word != "schedule.iterations=3"]
    begun = straight(FICTITIOUS, scratch / "begun")
    whole = tree(straight(words, scratch / "whole"))
    rng = random.Random(seed)
    files = sorted(p.relative_to(begun) for p in begun.rglob("*") if p.is_file() and p.name not in APART[1:])
    cases = [(i, how) for i in range(len(files)) for how in ("flip", "cut")]
    at = {case: rng.random() for case in cases}

    def one(case: tuple[int, str]) -> str:
        name, how = files[case[0]], case[1]
        place = scratch / f"hurt-{case[0]}-{how}"
        shutil.copytree(begun.parent, place / "outputs")
        shutil.rmtree(place / "outputs" / ".stages")
        path = place / "outputs" / "run" / name
        content = bytearray(path.read_bytes())
        content[int(at[case] * len(content))] ^= 1 << int(8 * at[case])
        path.chmod(0o644)
        path.write_bytes(content if how == "flip" else path.read_bytes()[:-4])
        code, told = forked(words, place)
        source = any(part in f"{name}" for part in SOURCES)
        assert code == (1 if source else 0), f"{name} {how}: exit {code}\n{told}"
        named = str(path) in told
        assert named, f"{name} {how}: not named\n{told}"
        if not source:
            found = tree(place / "outputs" / "run")
            assert found == whole, f"{name} {how}: {[n for n in whole if found.get(n) != whole[n]]}"
        shutil.rmtree(place)
        return "refused by name" if source else "made again, to the byte"

    tally = Tally(parallel(one, cases))
    return f"files damaged: {sum(tally.values())} ({len(files)} files, a flipped bit and a cut each): {dict(tally)}"


def killer(minutes: float, seed: int, scratch: Path, arms: dict[str, list[str]]) -> str:
    """Real processes of every arm, ended by signals at random times until one gets through; again and again."""
    rng = random.Random(seed)
    print(f"killer's seed {seed}", flush=True)

    def call(words: Sequence[str], place: Path, limit: float | None, number: int) -> int:
        command = [sys.executable, "-m", "spin_reg", "train", *words, f"outputs={place}"]
        with (place.parent / f"{place.name}.log").open("ab") as told:
            process = subprocess.Popen(command, stdout=told, stderr=told, cwd=ROOT)
            try:
                return process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                process.send_signal(number)
                return process.wait(timeout=60)

    def reference(name: str) -> tuple[dict[str, str], float]:
        place = scratch / f"{name}-straight"
        began = time.monotonic()
        assert call(arms[name], place, None, 0) == 0, (scratch / f"{place.name}.log").read_text()[-2000:]
        return tree(place / "run"), time.monotonic() - began

    with ThreadPoolExecutor(max_workers=2) as pool:
        known = dict(zip(arms, pool.map(reference, arms), strict=True))
        end, signals, rounds = time.monotonic() + 60 * minutes, Tally[str](), Tally[str]()

        def torment(name: str) -> None:
            whole, seconds = known[name]
            place = scratch / f"{name}-{rounds[name]}"
            while True:
                number = rng.choice([signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
                late = time.monotonic() > end
                code = call(arms[name], place, None if late else rng.uniform(0.5, 1.1 * seconds), number)
                if code == 0:
                    break
                assert code in (75, -number), f"{name}: exit {code}, see {place}.log"
                signals[number.name] += 1
            assert tree(place / "run") == whole, f"{name}: another end, see {place}"
            rounds[name] += 1
            shutil.rmtree(place)

        order = sorted(arms, key=lambda name: -known[name][1])

        def turns(names: Sequence[str]) -> None:
            while True:
                for name in names:
                    torment(name)
                if time.monotonic() > end:
                    return

        list(pool.map(turns, [order[:1], order[1:]]))  # the longest arm, beside the others in turn
    return f"signals survived: {sum(signals.values())} {dict(signals)}; runs that ended as without them: {dict(rounds)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["faults", "damage", "killer", "all"])
    parser.add_argument("--points", type=int, default=25, help="how many points to cut at; 0: all")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--model", help="a pretrained model's folder, for one more arm of the killer")
    parser.add_argument("--data", help="its rows (.jsonl)")
    given = parser.parse_args()
    load()
    memory = Path("/dev/shm")
    scratch = Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None))
    told = []
    try:
        if given.what in ("faults", "all"):
            told.append(faults(given.points, given.seed, scratch / "faults"))
        if given.what in ("damage", "all"):
            told.append(damage(given.seed, scratch / "damage"))
        if given.what in ("killer", "all"):
            place = Path(tempfile.mkdtemp())
            told.append(killer(given.minutes, given.seed, place, ARMS | pretrained(given.model, given.data)))
            shutil.rmtree(place)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print("\n".join(told))


def pretrained(model: str | None, data: str | None) -> dict[str, list[str]]:
    """The arm with a real model: full fine-tuning on 16 prompts, one iteration."""
    if model is None or data is None:
        return {}
    words = [
        *("tracker=none", "model=pretrained", f"model.name_or_path={model}", "dataset=jsonl", f"dataset.path={data}"),
        *("dataset.num_prompts=16", "dataset.num_heldout=4", "dataset.max_prompt_tokens=128"),
        *("dataset.max_response_tokens=128", "dataset.max_dropped=1", "generation.max_new_tokens=32", "alpha=0.5"),
        *("schedule.iterations=1", "schedule.epochs=1", "schedule.batch_size=4", "schedule.save_every=1"),
        *("schedule.learning_rate=1e-6", "hardware.threads=1", "run_name=run"),
    ]
    return {"kl-pretrained": words}


if __name__ == "__main__":
    main()
