"""A stage of a plan as a value, and what the settings of a run point at."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from spin_reg.benchmarks import TaskFiles
from spin_reg.fingerprint import digest_identity, flatten, identity, plain
from spin_reg.mt_bench import Asked
from spin_reg.specs import Spec

PLACES = {"model.name_or_path": "model", "model.chat_template": "model", "dataset.path": "data"}  # marked `place`


@dataclass(frozen=True)
class Sources:
    """What the settings point at, by content: None where it is made on the spot. `commit`: of a model of the Hub.

    `tasks`: of lm-eval, by name. `mt_bench`: its questions, and what the judge is told. `stamps`: what model and data
    looked like before they were read (see `sources.stamp`).
    """

    model: str | None
    tokenizer: str
    data: str | None
    commit: str | None = None
    tasks: Mapping[str, TaskFiles] = field(default_factory=dict)
    mt_bench: Asked | None = None
    stamps: tuple[Any, Any] = (None, None)


@dataclass(frozen=True)
class Stage:
    """A folder to be made exactly once.

    Attributes:
        name: for people. folder: where it lies, relative to the run folder. spec: what is to be done.
        needs: the stages whose folders it reads, by role.
    """

    name: str
    folder: str
    spec: Spec
    needs: Mapping[str, "Stage"] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return self.spec.kind

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over kind, version, the result-changing fields of the spec, and the needs' fingerprints."""
        needs = {role: need.fingerprint for role, need in self.needs.items()}
        return digest_identity([self.spec.kind, self.spec.version, self.spec, needs])


def changes(saved: dict[str, Any], spec: Spec) -> list[str]:
    """What a spec has otherwise than the saved one, without what changes no result."""
    old, new, counts = flatten(saved), flatten(plain(spec)), flatten(identity(spec))
    keys = (key for key in dict.fromkeys([*old, *new]) if key in counts or key not in new)
    return [
        f"{spec.hashed[key]}: SHA-256 {old.get(key)!s:.12} -> {new.get(key)!s:.12}"
        if key in spec.hashed
        else f"{key}: {json.dumps(old.get(key))} -> {json.dumps(new.get(key))}"
        for key in keys
        if old.get(key) != new.get(key)
    ]
