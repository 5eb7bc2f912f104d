"""Iterate 0 is the base as it is: only its name, revision and hash are kept."""

from pathlib import Path

from spin_reg import durable, models, sources
from spin_reg.context import Context
from spin_reg.specs import BaseSpec


def run(spec: BaseSpec, inputs: dict[str, Path], out: Path, context: Context) -> None:
    """Write base.json."""
    saved = {"name": spec.model.name_or_path, "revision": sources.model_revision(spec.model), "sha256": spec.sha256}
    durable.write_json(out / models.BASE_FILE, saved)
