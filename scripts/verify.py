#!/usr/bin/env python3
"""Recompute a run's references from what it left behind, by another road.

    python scripts/verify.py outputs/RUN [--rows N]

Reads pairs.parquet and the saved iterates only (and run.json for the settings), scores one unpadded row at a time with
full logits, mixes the reference with formulas written here, and compares: every reference log-prob, and the first
step's loss and margin of every iteration with what training logged. Of loss=sft, which has no pairs, it compares the
first step's loss alone, from the real answers in data/train.parquet. Shares no code with the package.
"""

import argparse
import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging


def load(run: Path, k: int) -> Any:
    folder = run / f"iterate-{k:02d}" / "model"
    record = folder / "base.json" if k > 0 else run / "iterate-00" / "base.json"
    if not record.exists():
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    saved = json.loads(record.read_text())
    place = json.loads((run / "run.json").read_text())["settings"]["model.name_or_path"]  # by now
    file = {"gguf_file": saved["gguf_file"]} if "gguf_file" in saved else {}
    model = AutoModelForCausalLM.from_pretrained(place, revision=saved["revision"], dtype="auto", **file)
    if (folder / "adapter_config.json").exists():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder)
    return model.eval()


@torch.no_grad()
def logprob(model: Any, prompt: list[int], answer: list[int]) -> float:
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double()
    table = torch.log_softmax(logits, dim=-1)
    return sum(float(table[len(prompt) - 1 + j, token]) for j, token in enumerate(answer))


def mixture(settings: dict[str, Any], t: int, lp: dict[int, float], k: int) -> float:
    """log r of iteration t from {iterate: log-prob}; k is the iterate that answered."""
    name = settings["regularizer._choice"]
    if name == "none":
        return lp[t]
    if name == "base":
        return lp[0]
    if name not in ("kl", "fictitious_play", "mixture_of_two"):
        sys.exit(f"verify.py does not know the regularizer {name}: add its formula here")
    history = 2 if name == "mixture_of_two" else settings["regularizer.history"]
    window = list(range(0 if history is None else max(0, t + 1 - history), t + 1))
    kind = settings["regularizer.reference"]
    if kind == "last":
        mixed = lp[t]
    elif kind == "generator":
        mixed = lp[k]
    elif kind == "geometric":
        mixed = sum(lp[i] for i in window) / len(window)
    else:
        top = max(lp[i] for i in window)
        mixed = top + math.log(sum(math.exp(lp[i] - top) for i in window) / len(window))
    if name != "kl":
        return mixed
    alpha = settings["regularizer.alpha"][min(t, len(settings["regularizer.alpha"]) - 1)]
    return float((1 - alpha) * mixed + alpha * lp[0])


def loss_of(settings: dict[str, Any], delta: float, beta: float) -> float:
    z = beta * delta
    return {
        "logistic": max(-z, 0.0) + math.log1p(math.exp(-abs(z))),
        "hinge": max(0.0, 1 - z),
        "exponential": math.exp(-z),
        "ipo": (delta - 1 / (2 * beta)) ** 2,
    }[settings["loss.name"]]


def order_key(seed: int, t: int, row: dict[str, Any]) -> str:
    name = f"{row['example_id']} {row['sampled_from']}" if "sampled_from" in row else row["example_id"]
    key = [seed, "order", t, 0, name]
    return hashlib.sha256(json.dumps(key, separators=(",", ":")).encode()).hexdigest()


def check_iteration(run: Path, settings: dict[str, Any], t: int, limit: int) -> tuple[float, float, float, float]:
    """The largest gaps of iteration t: reference (nats a sequence, nats a token), first step's loss, margin."""
    rows = pq.read_table(run / f"iteration-{t:02d}" / "pairs.parquet").to_pylist()
    size = settings["schedule.batch_size"]
    first = sorted(rows, key=lambda row: order_key(settings["seed"], t, row))[:size]
    picked = first + [row for row in rows if row not in first][: max(0, limit - len(first))]
    models = {k: load(run, k) for k in range(t + 1)}
    gap = gap_token = 0.0
    deltas = []
    for i, row in enumerate(picked):
        log_ratio = {}
        for kind in ("real", "generated"):
            lp = {k: logprob(m, row["prompt_ids"], row[f"{kind}_ids"]) for k, m in models.items()}
            stored = row[f"reference_{kind}_logprob"]
            off = abs(mixture(settings, t, lp, row["sampled_from"]) - stored)
            gap, gap_token = max(gap, off), max(gap_token, off / len(row[f"{kind}_ids"]))
            log_ratio[kind] = lp[t] - stored
        if i < len(first):
            deltas.append(log_ratio["real"] - log_ratio["generated"])
    beta = settings["schedule.beta"][min(t, len(settings["schedule.beta"]) - 1)]
    logged = first_row(run, t)
    loss = sum(loss_of(settings, d, beta) for d in deltas) / len(deltas)
    margin = beta * sum(deltas) / len(deltas)
    return gap, gap_token, abs(loss - logged["train/loss"]), abs(margin - logged["train/margin"])


def first_row(run: Path, t: int) -> dict[str, Any]:
    """What training logged of the first step of iteration t."""
    row: dict[str, Any] = json.loads((run / f"iterate-{t + 1:02d}/model/metrics.jsonl").read_text().splitlines()[0])
    return row


def check_answers(run: Path, settings: dict[str, Any], t: int) -> float:
    """The gap of the first step's loss of iteration t where it has no opponent: nats a token."""
    rows = pq.read_table(run / "data/train.parquet").to_pylist()
    first = sorted(rows, key=lambda row: order_key(settings["seed"], t, row))[: settings["schedule.batch_size"]]
    model = load(run, t)
    total = sum(logprob(model, row["prompt_ids"], row["real_ids"]) for row in first)
    return float(abs(-total / sum(len(row["real_ids"]) for row in first) - first_row(run, t)["train/loss"]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Recompute a run's reference log-probs, first losses and margins.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--rows", type=int, default=64, help="rows an iteration (the first batch is always checked)")
    args = parser.parse_args()
    logging.disable_progress_bar()
    settings = json.loads((args.run / "run.json").read_text())["settings"]
    if settings["loss.length_norm"] != "none":
        sys.exit("verify.py knows loss.length_norm=none only")
    if settings["loss.name"] == "sft":
        for t in range(len(list(args.run.glob("iterate-*/model"))) - (args.run / "iterate-00/model").exists()):
            gap = check_answers(args.run, settings, t)
            print(f"iteration {t}: first loss off by {gap:.1e} nats a token")
            if gap > 1e-4:
                sys.exit("the first step does not agree with the saved iterates")
        return
    worst = 0.0
    for t in range(len(list(args.run.glob("iteration-??")))):
        gap, token, loss, margin = check_iteration(args.run, settings, t, args.rows)
        worst = max(worst, token)
        print(
            f"iteration {t}: reference off by at most {gap:.1e} nats a sequence, {token:.1e} a token; "
            f"first loss {loss:.1e}, first margin {margin:.1e}"
        )
        if token > 1e-5 or (settings["dataset._choice"] == "toy" and gap > 1e-4) or loss > 1e-4 or margin > 1e-4:
            sys.exit("the stored references or the first step do not agree with the saved iterates")


if __name__ == "__main__":
    main()
