"""An iterate judged by a task of lm-eval: the harness's own command, in a process of its own, on the saved weights."""

import json
import logging
import math
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from spin_reg import child, durable, harness, iterates
from spin_reg.context import Context
from spin_reg.errors import DataError, SpinRegError
from spin_reg.specs import BenchmarkSpec
from spin_reg.stages.evaluate import position

Found = dict[str, Any]
BAR = re.compile(r"^Running (\w+) requests.*\| (\d+)/(\d+) \[")
SHOWN = 4  # lines
UNTOLD = "Yaml"  # lm-eval's version of a task whose YAML gives none
log = logging.getLogger(__name__)


def run(spec: BenchmarkSpec, inputs: dict[str, Path], out: Path, context: Context) -> None:
    """Write results.json, and what it says of the task as a whole as a row of metrics.jsonl."""
    scratch = out / durable.SCRATCH
    durable.remove(scratch / "results")
    durable.make_folder(scratch / "results")
    iterates.make_room()  # one model in memory is enough
    words = command(spec, inputs["model"], scratch)
    log.info("%s", shlex.join(words))

    def heard(line: str) -> None:
        bar = BAR.match(line)
        if bar and int(bar[2]):  # what came before the first is no measure of the rest
            context.progress(int(bar[2]), int(bar[3]), "request")

    code, lines = child.run(words, environment(spec), poll=context.poll, heard=heard)
    written = sorted((scratch / "results").rglob("*.json"))
    if code != 0 or not written:
        raise _failed(spec, code, lines)
    _unchanged(spec)
    found = json.loads(written[-1].read_bytes())
    results = list(numbers(found))
    durable.write_json(out / "results.json", asked(spec) | {"results": results})
    durable.write_jsonl(out / "metrics.jsonl", [row(spec, inputs["model"], results, found)])


def command(spec: BenchmarkSpec, model: Path, scratch: Path) -> list[str]:
    """The words that run lm-eval on an iterate's folder."""
    templates = scratch if spec.apply_chat_template else None
    weights: Found = dict(iterates.for_others(model, spec, tokenizer=templates))
    weights |= {"dtype": spec.dtype.value, "trust_remote_code": spec.trust_remote_code, "use_safetensors": True}
    if spec.attn_implementation is not None:
        weights["attn_implementation"] = spec.attn_implementation
    words = [sys.executable, "-P", "-m", "lm_eval", "--model", "hf", "--model_args", json.dumps(weights)]
    words += ["--tasks", spec.task, "--batch_size", str(spec.batch_size)]
    words += ["--device", "cuda" if torch.cuda.is_available() else "cpu"]
    words += ["--output_path", str(scratch / "results" / "results.json")]
    if spec.num_fewshot is not None:
        words += ["--num_fewshot", str(spec.num_fewshot)]
    if spec.limit is not None:
        words += ["--limit", str(spec.limit)]
    if spec.include_path is not None:
        words += ["--include_path", str(Path(spec.include_path).expanduser().absolute())]
    return words + ["--apply_chat_template"] * spec.apply_chat_template


def environment(spec: BenchmarkSpec) -> dict[str, str]:
    """The child's environment: our threads, and no network for a task whose data are here."""
    found = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_DISABLE_TELEMETRY": "1"}
    found |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return found | (offline if spec.local else {})


def _unchanged(spec: BenchmarkSpec) -> None:
    """Files of the task that were changed while it was asked make numbers of neither."""
    if spec.files is not None and harness.as_it_is(spec.task, spec.include_path).sha256 != spec.files:
        raise DataError(
            "A benchmark has changed.",
            where=f"iterate {spec.k}, {spec.words}",
            why="its files, or its data, are not what they were when this command began",
            todo="run the same command again: it is asked anew",
        )


def _failed(spec: BenchmarkSpec, code: int, lines: list[str]) -> SpinRegError:
    said = [line for line in lines if not BAR.match(line)]
    log.error("lm-eval said last:\n%s", "\n".join(said))
    how = f"exit code {code}" if code > 0 else f"ended by signal {-code}" if code else "it left no results"
    why = f"{how}; it said last: {' | '.join(line.strip() for line in said[-SHOWN:])}"[:1200]
    return SpinRegError(
        "lm-eval failed.",
        where=f"iterate {spec.k}, {spec.words}",
        why=why,
        todo="mend it and run the same command again; run.log has its command and more of its words",
    )


def asked(spec: BenchmarkSpec) -> Found:
    """What was asked for, and of which lm-eval."""
    keys = ("task", "num_fewshot", "apply_chat_template", "limit")
    return {"iterate": spec.k} | {key: getattr(spec, key) for key in keys} | {"lm_eval": harness.version()}


def numbers(found: Found) -> Iterator[Found]:
    """Each metric of each task and group of lm-eval's results, with its standard error; null where that is not finite.

    `num_fewshot` is how many examples were shown in fact (a task may insist), `items` how many questions were asked.
    """
    for task, values in found["results"].items():
        leaves = tasks(found, task)
        for key, value in values.items():
            metric, comma, filter_ = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            better = found.get("higher_is_better", {}).get(task) or {}
            yield {
                "task": task,
                "metric": metric,
                "filter": filter_,
                "value": _finite(value),
                "se": _finite(values.get(f"{metric}_stderr,{filter_}")),
                "higher_is_better": better.get(metric),
                "task_version": None if found["versions"].get(task) == UNTOLD else found["versions"].get(task),
                "num_fewshot": one(found["n-shot"].get(leaf) for leaf in leaves),
                "items": items(found, leaves),
            }


def tasks(found: Found, name: str) -> set[str]:
    """The tasks of a group, whose groups are opened; a task is its own."""
    if name in found["n-samples"]:
        return {name}
    return {leaf for part in found.get("group_subtasks", {}).get(name, ()) for leaf in tasks(found, part)}


def items(found: Found, leaves: set[str]) -> int:
    """How many questions were asked by these tasks together."""
    return sum(int(found["n-samples"][leaf]["effective"]) for leaf in leaves)


def one(values: Iterable[Any]) -> Any:
    """The one value that all are; else all that there are, as a text."""
    different = {str(value): value for value in values}
    return next(iter(different.values())) if len(different) == 1 else ", ".join(sorted(different))


def _finite(value: Any) -> float | None:
    plain = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if plain else None  # lm-eval writes N/A, or NaN of one item


def row(spec: BenchmarkSpec, model: Path, results: list[Found], found: Found) -> Found:
    """The row of metrics.jsonl: eval/TASK/METRIC, with _se, of the task that was asked for; of a group that gives no
    number itself, of its tasks. METRIC is as lm-eval writes it, without the filter `none`.
    """
    own = [result for result in results if result["task"] == spec.task] or results
    leaves = {leaf for result in own for leaf in tasks(found, result["task"])}
    values: Found = {}
    for result in own:
        name = f"eval/{result['task']}/{result['metric']}" + f",{result['filter']}".removesuffix(",none")
        values |= {key: v for key, v in ((name, result["value"]), (f"{name}_se", result["se"])) if v is not None}
    shots = one(found["n-shot"].get(leaf) for leaf in leaves)
    if spec.num_fewshot not in (None, shots):
        log.warning("%s: %s worked examples were shown, not %d: it insists", spec.task, shots, spec.num_fewshot)
    return {
        "iterate": spec.k,
        **position(model),
        **values,
        "task": spec.task,
        "task_version": one(result["task_version"] for result in own),
        "num_fewshot": shots,
        "apply_chat_template": spec.apply_chat_template,
        "items": items(found, leaves),
        "lm_eval": harness.version(),
    }
