"""What people would use: transformers' `generate`, then TRL's DPOTrainer, on the prompts and pairs that a run left.

    python peer.py --model FOLDER --pairs pairs.parquet --out FOLDER ...

Its settings are its best: prompts sorted by length, reference log-probs computed once, no logging, fused AdamW, token
ids as they are, so that it spends nothing on data. The last line of its output is JSON: by part of the work seconds and
the peak of the resident set in bytes; seconds of every step but the first; tokens of every answer it drew; its mean
loss; and, to show that both sides score the same, the largest gap between its reference log-probs and ours, in nats.
"""

import time

BEGAN = time.perf_counter()

import argparse  # noqa: E402
import json  # noqa: E402
import resource  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from contextlib import contextmanager, nullcontext, suppress  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from datasets.utils.logging import disable_progress_bar  # noqa: E402
from draw import by_generate, ends_of  # noqa: E402

COLUMNS = {"prompt_ids": "prompt_ids", "chosen_ids": "real_ids", "rejected_ids": "generated_ids"}
REFERENCES = {"ref_chosen_logps": "reference_real_logprob", "ref_rejected_logps": "reference_generated_logprob"}
Parts = dict[str, dict[str, float]]
PARTS: Parts = {"imports": {"seconds": time.perf_counter() - BEGAN}}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def now() -> float:
    """Seconds, once the device has done what it was given."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def part(name: str) -> Iterator[None]:
    """Time a part of the work; its peak is the resident set's high-water mark since it began (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    began = now()
    yield
    PARTS[name] = {"seconds": now() - began, "peak": resident()}


def resident() -> int:
    """The high-water mark of the resident set, in bytes."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class OnIds(trl.DPOTrainer):  # type: ignore[misc]
    """TRL's trainer on pairs that are token ids already, its pass for the reference timed."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        with part("scoring"):
            return super()._precompute_ref_logps(*args, **kwargs)


class Clock(transformers.TrainerCallback):  # type: ignore[misc]
    """When each optimiser step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(now())


def config(args: argparse.Namespace) -> Any:
    return trl.DPOConfig(
        output_dir=str(args.out),
        per_device_train_batch_size=args.micro,
        gradient_accumulation_steps=args.batch // args.micro,
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=args.micro,
        num_train_epochs=args.epochs,
        learning_rate=args.learning_rate,
        beta=args.beta,
        optim="adamw_torch_fused",
        gradient_checkpointing=args.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=args.precision == "bf16",
        use_cpu=DEVICE == "cpu",
        dataloader_pin_memory=DEVICE == "cuda",
        max_length=None,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Sample and train with transformers and TRL, and say what it took.")
    for name in ("--model", "--pairs", "--out"):
        parser.add_argument(name, type=Path, required=True)
    for name in ("--batch", "--micro", "--sample-batch", "--new-tokens", "--epochs", "--threads"):
        parser.add_argument(name, type=int, required=True)
    for name in ("--learning-rate", "--beta"):
        parser.add_argument(name, type=float, required=True)
    parser.add_argument("--precision", choices=("fp32", "bf16"), required=True)
    parser.add_argument("--checkpointing", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bar()
    rows = pq.read_table(args.pairs, columns=[*COLUMNS.values(), *REFERENCES.values()]).to_pydict()
    with part("load"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(DEVICE).eval()
    ends = ends_of(model, tokenizer)
    with part("sampling"), torch.autocast(DEVICE, torch.bfloat16) if args.precision == "bf16" else nullcontext():
        answers = by_generate(model, rows["prompt_ids"], args.sample_batch, args.new_tokens, ends)
    clock = Clock()
    with part("build"):
        data = Dataset.from_dict({theirs: rows[ours] for theirs, ours in COLUMNS.items()})
        trainer = OnIds(
            model=model, args=config(args), train_dataset=data, processing_class=tokenizer, callbacks=[clock]
        )
    PARTS["build"]["seconds"] -= PARTS["scoring"]["seconds"]  # which lies within it
    with part("train"):
        trained = trainer.train()
    with part("save"):
        trainer.save_model(str(args.out))
    told = {
        "parts": PARTS,
        "steps": len(clock.ends),
        "step_seconds": [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)],
        "answer_tokens": answers,
        "loss": trained.training_loss,
        "reference_gap": max(
            abs(a - b)
            for theirs, ours in REFERENCES.items()
            for a, b in zip(trainer.train_dataset[theirs], rows[ours], strict=True)
        ),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
