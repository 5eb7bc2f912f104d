"""Iterate 0 is the base as it is: only its name, revision and hash are kept."""

from pathlib import Path

from spin_reg import durable, iterates
from spin_reg.context import Context
from spin_reg.specs import BaseSpec


def run(spec: BaseSpec, inputs: dict[str, Path], out: Path, context: Context) -> None:
    """Write base.json."""
    durable.write_json(out / iterates.BASE_FILE, iterates.base_record(spec.model, spec.sha256))
