"""One repeat: both sides as children, what they took, and what that comes to."""

import argparse
import json
import sys
from pathlib import Path

import arithmetic
import children
from arithmetic import STEP, WHOLE, Lengths, Raw, Shape

BETA, LEARNING_RATE = 0.1, 1e-6


def ours(args: argparse.Namespace, scratch: Path, outputs: Path, epochs: int) -> list[str]:
    """The words of our command behind `train`."""
    return [
        *("model=pretrained", f"model.name_or_path={args.model}", "dataset=jsonl", f"dataset.path={args.data}"),
        *(f"dataset.num_prompts={args.prompts}", "dataset.num_heldout=1", "dataset.max_dropped=1"),
        *("regularizer=none", "evaluation=none", "tracker=none", "schedule.iterations=1"),
        *(f"schedule.epochs={epochs}", f"schedule.batch_size={args.batch}", "schedule.optimizer=adamw"),
        *(
            f"schedule.learning_rate={LEARNING_RATE}",
            f"schedule.beta={BETA}",
            "schedule.save_every=1000000",
            "schedule.warmup_ratio=0",
        ),
        *(f"generation.max_new_tokens={args.new_tokens}", f"generation.batch_size={args.sample_batch}"),
        *(f"hardware.micro_batch_size={args.micro}", f"hardware.score_batch_size={2 * args.micro}"),
        *(f"hardware.precision={args.precision}", f"hardware.threads={args.threads}"),
        *(f"hardware.gradient_checkpointing={str(args.checkpointing).lower()}", f"outputs={outputs}"),
        "run_name=run",
    ]


class Bench:
    """The measurements: options, a scratch folder, the probe, and the model's shape."""

    def __init__(self, args: argparse.Namespace, scratch: Path, gemm: children.Gemm, model: Shape) -> None:
        self.args, self.scratch, self.gemm, self.model = args, scratch, gemm, model
        self.pairs: Path | None = None
        self.lengths = Lengths([], [], [])

    def child(self, *words: str, code: int = 0) -> children.Ended:
        return children.run(words, threads=self.args.threads, scratch=self.scratch, code=code)

    def spin_reg(self, *words: str, code: int = 0) -> children.Ended:
        return self.child("-m", "spin_reg", *words, code=code)

    def outputs(self, number: int, epochs: int) -> Path:
        return self.scratch / f"outputs{number}-{epochs}"

    def train(self, number: int, epochs: int) -> Raw:
        """Our command; rows by part. The first one's pairs are what every peer gets."""
        outputs = self.outputs(number, epochs)
        ended = self.spin_reg("train", *ours(self.args, self.scratch, outputs, epochs))
        stages = arithmetic.took((outputs / "run" / "run.log").read_text())
        if self.pairs is None:
            self.pairs = outputs / "run" / "iteration-00" / "pairs.parquet"
            self.lengths = lengths(self.pairs)
        lines = (outputs / "run" / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["train/loss"] for line in lines]
        loss = sum(losses) / len(losses)
        return {"stages": stages, "seconds": ended.seconds, "peak": ended.peak, "loss": loss}

    def ours(self, number: int) -> Raw:
        """An iteration of ours."""
        ended = self.train(number, self.args.epochs)
        return {
            **arithmetic.completed(arithmetic.by_part(ended["stages"]), ended["seconds"], ended["peak"]),
            "raw": ended,
            "answer_tokens": list(self.lengths.generated),
        }

    def step(self, number: int, once: Raw) -> Raw:
        """A step of ours, from the training stages of the iteration and of the same with more epochs.

        That one makes all its stages itself: a run that took them over would import its libraries while it trains.
        """
        longer = self.train(number, self.args.epochs + self.args.more_epochs)
        stage = "iteration-00/train"
        extra = longer["stages"][stage]["seconds"] - once["raw"]["stages"][stage]["seconds"]
        seconds = extra / (self.args.more_epochs * self.steps())
        return {"longer": longer} | ({"seconds": seconds} if seconds > 0 else {})  # below 0 where noise is all there is

    def steps(self) -> int:
        """Optimiser steps of an epoch."""
        batch: int = self.args.batch
        return -(-len(self.lengths.prompt) // batch)

    def peer(self) -> Raw:
        """An iteration of the peer's."""
        args, out = self.args, self.scratch / "peer"
        words = [str(children.HERE / "peer.py"), "--model", str(args.model), "--pairs", str(self.pairs)]
        words += ["--out", str(out), "--precision", args.precision, *(["--checkpointing"] * args.checkpointing)]
        words += ["--learning-rate", str(LEARNING_RATE), "--beta", str(BETA)]
        for name in ("batch", "micro", "sample_batch", "new_tokens", "epochs", "threads"):
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        ended = self.child(*words)
        told = children.last_json(ended.out)
        parts = {
            "sampling": together(told["parts"], "load", "sampling"),
            "scoring": told["parts"]["scoring"],
            "training": together(told["parts"], "build", "train", "save"),
        }
        assert told["steps"] == self.args.epochs * self.steps(), "both sides must make as many steps"
        found = arithmetic.completed(parts, ended.seconds, ended.peak)
        if told["step_seconds"]:
            found[STEP] = {"seconds": sum(told["step_seconds"]) / len(told["step_seconds"])}
        return {**found, "raw": told, "answer_tokens": told["answer_tokens"]}

    def rated(self, side: Raw, rate: float, step: float | None = None, *, draws_scores: bool = False) -> Raw:
        """With tokens a second and utilisation, given the GEMM rate around the child (and around that of the steps).

        `draws_scores`: generated answers come with their log-probs, so that only the real ones are scored.
        """
        drawn = arithmetic.sampling_work(self.model, self.lengths, side["answer_tokens"])
        (read, tokens), epochs = arithmetic.pairs_work(self.model, self.lengths), self.args.epochs
        real, _ = arithmetic.sampling_work(self.model, self.lengths, self.lengths.real)
        steps, scored = self.steps(), real if draws_scores else read
        work: dict[str, tuple[float, float | None]] = {
            "sampling": drawn,
            "scoring": (scored, tokens),
            "training": (3 * epochs * read, epochs * tokens),
            STEP: (3 * read / steps, tokens / steps),
            WHOLE: (drawn[0] + scored + 3 * epochs * read, None),
        }
        for row, (flops, counted) in work.items():
            if "seconds" in side.get(row, {}):
                seconds = side[row]["seconds"]
                at = step if row == STEP and step is not None else rate
                side[row] |= {"flops": flops, "utilisation": arithmetic.utilisation(flops, seconds, at)}
                side[row] |= {} if counted is None else {"tokens": counted, "tokens_s": counted / seconds}
        return side

    def repeat(self, number: int) -> Raw:
        """Both sides once, the peer first in every second repeat, matrix products before and after each child."""
        rates = [self.gemm.rates()]
        found: Raw = {}
        around: dict[str, float] = {}
        for turn in ["ours", "peer"] if number % 2 == 0 else ["peer", "ours"]:
            for name in [turn, "step"] if turn == "ours" and self.args.more_epochs else [turn]:
                print(f"repeat {number + 1} of {self.args.repeats}: {name}", file=sys.stderr, flush=True)
                if name == "step":
                    found["ours"][STEP] = self.step(number, found["ours"])
                else:
                    found[name] = self.ours(number) if name == "ours" else self.peer()
                rates.append(self.gemm.rates())
                around[name] = (rates[-2][self.args.precision] + rates[-1][self.args.precision]) / 2
        return {
            "ours": self.rated(
                found["ours"], around["ours"], around.get("step"), draws_scores=self.args.precision == "fp32"
            ),
            "peer": self.rated(found["peer"], around["peer"]),
            "gemm": rates,
        }

    def overheads(self) -> dict[str, list[float]]:
        """Wall seconds of commands that compute nothing, each as often as there are repeats."""
        words = ours(self.args, self.scratch, self.outputs(0, self.args.epochs), self.args.epochs)
        hundred = [*(w for w in words if not w.startswith(("schedule.iterations", "run_name"))), "run_name=hundred"]
        commands: dict[str, tuple[list[str], int]] = {
            "--help": (["--help"], 0),
            "train, a setting that is wrong": (["train", *words, "schedule.batch_size=0"], 2),
            "train, a finished run": (["train", *words], 0),
            "plan, schedule.iterations=100": (["plan", *hundred, "schedule.iterations=100"], 0),
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(self.args.repeats):
            for name, (given, code) in commands.items():
                seconds[name].append(self.spin_reg(*given, code=code).seconds)
        return seconds


def together(parts: dict[str, Raw], *names: str) -> Raw:
    """Parts of the peer's as one."""
    peak = max(parts[name]["peak"] for name in names)
    return {"seconds": sum(parts[name]["seconds"] for name in names), "peak": peak}


def lengths(pairs: Path) -> Lengths:
    """Tokens of each pair, from pairs.parquet."""
    import pyarrow.parquet as pq

    rows = pq.read_table(pairs, columns=["prompt_ids", "real_ids", "generated_ids"]).to_pydict()
    prompt, real, generated = (list(map(len, rows[f"{name}_ids"])) for name in ("prompt", "real", "generated"))
    return Lengths(prompt, real, generated, arithmetic.shared(rows["prompt_ids"]))
