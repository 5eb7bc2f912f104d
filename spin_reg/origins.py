"""What a run is made from, by content: hashed, or taken over from the run's record while nothing has moved."""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from spin_reg import harness, hub, questions, sources
from spin_reg.config import Config
from spin_reg.corpora import Corpus, Dataset, parts
from spin_reg.errors import ConfigError
from spin_reg.plan import Sources
from spin_reg.settings import Model, Pretrained
from spin_reg.stage import PLACES

SHA256 = 64  # hex digits: what lies on this machine is hashed, and data of the Hub are known by a shorter commit


def moved(root: Path, old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """What is looked for in another place than the run has on record, as {key: "key: old -> new"}.

    Raises:
        ConfigError: the run was made with other settings.
    """
    keys = [key for key in [*old, *(key for key in new if key not in old)] if old.get(key) != new.get(key)]
    lines = {key: f"{key}: {json.dumps(old.get(key))} -> {json.dumps(new.get(key))}" for key in keys}
    changed = [lines[key] for key in keys if key not in PLACES or None in (old.get(key), new.get(key))]
    if changed:
        raise _other(root, "; ".join(changed))
    return lines


def _other(root: Path, why: str) -> ConfigError:
    todo = "leave these settings as they were; spin-reg train with another run_name, or none, begins a run with them"
    return ConfigError("This run folder was made with other settings.", where=str(root), why=why, todo=todo)


def found(settings: Config, known: dict[str, Any], moved: Collection[str] = ()) -> Sources:
    """Hash what the settings point at; what a run folder has on record is taken over while nothing has moved.

    And where it is not there any more: what was made from it needs it no longer, and who reads it will say so. What was
    `moved` is hashed.
    """
    known = {role: entry for role, entry in known.items() if role not in {PLACES[key] for key in moved}}
    looks = (sources.stamp(settings.model), sources.stamp(settings.dataset))  # what is written later has others
    entry, commit = _recorded(known.get("model"), looks[0], lambda entry: _model_gone(settings.model, entry)), None
    if entry is None:
        model = [sources.model_sha256(settings.model), sources.tokenizer_sha256(settings.model)]
        entry = {"sha256": model, "stamp": looks[0]}
        if isinstance(settings.model, Pretrained):
            commit = sources.model_revision(settings.model)
    elif isinstance(settings.model, Pretrained) and entry.get("commit"):
        commit = entry["commit"]
        hub.pin(settings.model, commit)  # a branch may have moved since
    data = _recorded(known.get("data"), looks[1], lambda entry: _data_gone(settings.dataset, entry))
    if data is None:
        data = {"sha256": [sources.data_sha256(settings.dataset)], "stamp": looks[1]}
    tasks = harness.tasks(settings.evaluation, known.get("tasks", {}))
    bench = settings.evaluation.mt_bench
    asked = None if bench.questions is None else questions.asked(bench, settings.evaluation.judge.prompts)
    weights, tokenizer = entry["sha256"]
    return Sources(weights, str(tokenizer), data["sha256"][0], commit, tasks, asked, (entry["stamp"], data["stamp"]))


def record(found: Sources, before: dict[str, Any]) -> dict[str, Any]:
    """What a run folder keeps of its sources; tasks that it was once judged by stay named."""
    tasks = {name: task.sha256 for name, task in found.tasks.items() if task.sha256 is not None}
    return {
        "model": {
            "stamp": found.stamps[0],
            "sha256": [found.model, found.tokenizer],
            "commit": found.commit,
        },
        "data": {"stamp": found.stamps[1], "sha256": [found.data]},
        "tasks": before.get("tasks", {}) | tasks,
    }


def _recorded(
    entry: dict[str, Any] | None, stamp: Any, gone: Callable[[dict[str, Any]], bool]
) -> dict[str, Any] | None:
    same = entry is not None and stamp is not None and entry["stamp"] == stamp
    return entry if same or (entry is not None and gone(entry)) else None


def _model_gone(model: Model, entry: dict[str, Any]) -> bool:
    """Whether a model's folder, or the file with its template, was on this machine and is no longer there."""
    if not isinstance(model, Pretrained) or entry["commit"] is not None:
        return False
    return not all(Path(place).expanduser().exists() for place in (model.name_or_path, model.chat_template or "/"))


def _data_gone(dataset: Dataset, entry: dict[str, Any]) -> bool:
    """Whether one of the data's files and folders was on this machine and is no longer there."""
    if not isinstance(dataset, Corpus):
        return False
    both = zip(parts(dataset), str(entry["sha256"][0]).split(","), strict=False)
    return any(len(content) == SHA256 and not Path(part.path).expanduser().exists() for part, content in both)
