"""What a run is made from, by content: hashed, or taken over from the run's record while nothing has moved."""

from typing import Any

from spin_reg import harness, hub, questions, sources
from spin_reg.config import Config
from spin_reg.plan import Sources
from spin_reg.settings import Pretrained


def found(settings: Config, known: dict[str, Any]) -> Sources:
    """Hash what the settings point at; what a run folder has on record is taken over while nothing has moved."""
    stamps = (sources.stamp(settings.model), sources.stamp(settings.dataset))  # what is written later has others
    model, commit = _recorded(known.get("model"), stamps[0]), None
    if model is None:
        model = [sources.model_sha256(settings.model), sources.tokenizer_sha256(settings.model)]
        if isinstance(settings.model, Pretrained):
            commit = sources.model_revision(settings.model)
    elif isinstance(settings.model, Pretrained) and known["model"].get("commit"):
        commit = known["model"]["commit"]
        hub.pin(settings.model, commit)  # a branch may have moved since
    data = _recorded(known.get("data"), stamps[1])
    if data is None:
        data = [sources.data_sha256(settings.dataset)]
    tasks = harness.tasks(settings.evaluation, known.get("tasks", {}))
    bench = settings.evaluation.mt_bench
    asked = None if bench.questions is None else questions.asked(bench, settings.evaluation.judge.prompts)
    return Sources(model[0], str(model[1]), data[0], commit, tasks, asked, stamps)


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


def _recorded(entry: dict[str, Any] | None, stamp: Any) -> list[str | None] | None:
    return entry["sha256"] if entry is not None and stamp is not None and entry["stamp"] == stamp else None
