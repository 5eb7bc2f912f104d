"""Measure an iteration of spin-reg against what people would use for it: transformers' `generate` and TRL's DPOTrainer.

    python scripts/bench --quick                         the embedded toy; within five minutes on two cores
    python scripts/bench --model FOLDER --data FILE.jsonl --prompts 64 --new-tokens 128 --batch 4 --repeats 3

Every repeat runs both sides as whole child processes, in turns: ours then the peer, then the peer first. Ours is the
real command; the seconds of its stages are read from its run.log. The peer (peer.py; extra `trl`) gets the prompts
and pairs of our first run as token ids, so both train on the same tokens. A third child, ours with more epochs over
the same pairs, gives the time of a step: the difference of the two training stages over the steps between them, so
that start and end are left out; the peer's is the mean over all its steps but the first.

Sampling and training include loading the model, and training also building the trainer, our self-check, and saving.
`tok/s` counts new tokens in sampling, and in scoring and training both rows of each pair, the prompt in each. `peer /
ours` is the median of the ratios within a repeat, of seconds a token. Utilisation is the FLOPs needed over the
seconds and over the rate of a square matrix product in the same precision just before and after. Needed are 2 a token
and weight (the embedding left out, the head where a logit is used), and 4 * context * width * layers a token for
attention (causal: a token's context is what it sees); for training three times that. A pair's prompt is needed once;
to score its generated answer nothing is where its log-prob comes with drawing it, as ours do in fp32. Padding is not
needed, nor the forward that checkpointing repeats. Peaks are of resident memory, the whole iteration's of its process.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import arithmetic
import children
from arithmetic import Raw
from measure import Bench
from report import PACKAGES, report

QUICK = {"prompts": 512, "new_tokens": 32, "batch": 32, "repeats": 3, "more_epochs": 4}


def arguments() -> argparse.Namespace:
    about = "Measure spin-reg against transformers' generate and TRL's DPOTrainer."
    parser = argparse.ArgumentParser(prog="python scripts/bench", description=about)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder (default: the toy's iterate 0)")
    parser.add_argument("--data", type=Path, help="a .jsonl file (default: the toy's prompts and answers)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast on both sides")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32, help="the longest answer")
    parser.add_argument("--batch", type=int, default=8, help="pairs an optimiser step")
    parser.add_argument("--micro", type=int, help="pairs a forward of training and scoring (default: --batch)")
    parser.add_argument("--sample-batch", type=int, default=32, help="prompts answered at once")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--more-epochs", type=int, default=2, help="of the run that a step's time is from; 0: none")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing on both sides")
    parser.add_argument("--threads", type=int, default=children.cores())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--gemm-seconds", type=float, default=0.5, help="of each matrix product probe")
    parser.add_argument(
        "--quick", action="store_true", help="less, where not said: " + ", ".join(f"{k} {v}" for k, v in QUICK.items())
    )
    parser.add_argument("--json", type=Path, help="all that was measured goes here, after every repeat")
    parser.add_argument("--table", type=Path, help="only print the tables of such a file")
    if parser.parse_args().quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args()
    args.micro = args.micro or args.batch
    if args.batch % args.micro:
        parser.error("--batch must be a multiple of --micro")
    if (args.model is None) != (args.data is None) and not args.table:
        parser.error("--model and --data go together; with neither, the embedded toy is measured")
    return args


def toy(scratch: Path, threads: int) -> tuple[Path, Path]:
    """The embedded toy made on the spot: its iterate 0, and its prompts and real answers as .jsonl."""
    words = ["regularizer=none", "schedule.iterations=1", "schedule.epochs=1", "evaluation=none", "tracker=none"]
    words += [f"hardware.threads={threads}", f"outputs={scratch}", "run_name=toy"]
    children.run(["-m", "spin_reg", "train", *words], threads=threads, scratch=scratch)
    path = scratch / "toy.jsonl"
    children.run([str(children.HERE / "texts.py"), str(scratch / "toy"), str(path)], threads=1, scratch=scratch)
    return scratch / "toy" / "iterate-00" / "model", path


def options(args: argparse.Namespace) -> Raw:
    """What was asked for."""
    made = {"model": args.model or "the toy", "data": args.data or "the toy's"}
    return {name: str(value) if isinstance(value, Path) else value for name, value in (vars(args) | made).items()}


def machine(args: argparse.Namespace) -> Raw:
    """What the numbers hang on: machine, versions, thread count, commit."""
    found: Raw = {"platform": platform.platform(), "python": platform.python_version(), "threads": args.threads}
    found["cores"] = children.cores()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found["processor"] = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        found["memory"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    with suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", str(children.ROOT)]
        found["commit"] = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
        found["changed"] = bool(subprocess.check_output([*git, "status", "--porcelain"], text=True).strip())
    return found


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def keep(path: Path | None, raw: Any) -> None:
    if path is not None:
        path.write_text(json.dumps(raw) + "\n")


def main() -> None:
    args = arguments()
    if args.table:
        print(report(json.loads(args.table.read_text())))
        return
    raw: Raw = {"machine": machine(args), "options": options(args), "repeats": [], "overheads": {}}
    with TemporaryDirectory() as place, children.Gemm(args.threads, args.gemm_seconds) as gemm:
        scratch = Path(place)
        if args.model is None:
            args.model, args.data = toy(scratch, args.threads)
        args.model, args.data = args.model.resolve(), args.data.resolve()
        bench = Bench(args, scratch, gemm, arithmetic.shape(args.model))
        for number in range(args.repeats):
            raw["repeats"].append(bench.repeat(number))
            raw["pairs"] = vars(bench.lengths)
            keep(args.json, raw)
        say("overheads")
        raw["overheads"] = bench.overheads()
        keep(args.json, raw)
    print(report(raw))


if __name__ == "__main__":
    main()
