"""What a stage will leave on the disk, beside what stages leave: tables of few rows and of many, records, metrics."""

import json
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SMALL, Result
from hydra import compose, initialize_config_dir

from spin_reg import amounts, config, footers, launch, outlook, overrides, rundir, stored, tables
from spin_reg.specs import EvaluateSpec, SftSpec, Split, TrainSpec

SCHEMAS = ("EXAMPLES", "PUBLISHED", "ANSWERS", "SCORES", "PAIRS", "DIVERGENCES")


def rows(count: int, rng: random.Random, few: int) -> list[dict[str, Any]]:
    """Rows with the columns of every schema: words of so few letters, as long as a sentence."""
    made = []
    for i in range(count):
        row: dict[str, Any] = {"example_id": f"{rng.getrandbits(64):016x}", "source": None, "data_logprob": None}
        for name in ("prompt", "real", "generated"):
            ids = [rng.randrange(few) for _ in range(rng.randint(5, 40))]
            row |= {f"{name}_ids": ids, name: "".join(chr(97 + token % 26) * 3 for token in ids)}
        numbers = ("logprob", "kl", "reference_real_logprob", "reference_generated_logprob")
        row |= {name: -100 * rng.random() for name in numbers}
        row |= {"sampled_from": i % 2, "finish_reason": "stop" if i % 3 else "length"}
        made.append(row | {"token_logprobs": [-rng.random() for _ in row["generated_ids"]]})
    return made


def tokens(some: list[dict[str, Any]]) -> dict[str, float]:
    names = ("prompt_ids", "real_ids", "generated_ids", "token_logprobs")
    return {name: float(sum(len(row[name]) for row in some)) for name in names}


def known(count: int, folder: Path) -> Mapping[str, footers.Cost]:
    """Of so many rows; of the answers as of the real ones."""
    tables.write(folder / "data.parquet", rows(count, random.Random(0), 50), tables.EXAMPLES)
    found = footers.costs(footers.columns(folder / "data.parquet"), tables.EXAMPLES)
    assert found.keys() == {"example_id", "prompt_ids", "real_ids", "prompt", "real"}
    return found | {"generated_ids": found["real_ids"], "generated": found["real"]}


@pytest.mark.parametrize(("there", "asked"), [(8, 8), (8, 3), (64, 64), (256, 128), (300, 257), (300, 1000)])
@pytest.mark.parametrize("name", SCHEMAS)
def test_a_table_weighs_what_its_schema_and_its_columns_foretell(
    name: str, there: int, asked: int, tmp_path: Path
) -> None:
    """Of as many rows as the data have, of a share of them, of more."""
    schema, some = getattr(tables, name), rows(asked, random.Random(1), 50)
    tables.write(tmp_path / "a.parquet", some, schema)
    null = frozenset({"source", "data_logprob"} if name == "EXAMPLES" else ())
    foretold = footers.weigh(schema, asked, tokens(some), known(there, tmp_path), null)
    assert foretold == pytest.approx((tmp_path / "a.parquet").stat().st_size, rel=0.1)


def test_the_frame_is_that_of_the_schema(tmp_path: Path) -> None:
    """To the byte for the rows it is weighed with, and more with every column: nobody says how much one takes."""
    least = {"example_id": "", "sampled_from": 0, "logprob": 0.0, "token_logprobs": [0.0]}
    frame = footers.frame(tables.SCORES)
    for groups, count in ((1, 1), (2, 257)):
        tables.write(tmp_path / "a.parquet", [least] * count, tables.SCORES)
        size = (tmp_path / "a.parquet").stat().st_size
        assert size == pytest.approx(frame.file + groups * frame.group, abs=0 if count == 1 else 60)
    more = tables.SCORES.append(tables.PAIRS.field("reference_real_logprob"))
    assert footers.frame(more).file > frame.file and footers.frame(more).group > frame.group + 98


def test_longest_texts_stand_in_the_footer_too(tmp_path: Path) -> None:
    """Of a row group the least and the greatest text, and once more in a page's header: of two rows most of a file."""
    rng = random.Random(2)
    some = rows(2, rng, 50)
    for row in some:
        row["real"] = "".join(chr(rng.randrange(33, 127)) for _ in range(3000))
    tables.write(tmp_path / "a.parquet", some, tables.EXAMPLES)
    found = footers.columns(tmp_path / "a.parquet")
    assert found.bounds["real"] == 6000
    cost = footers.costs(found, tables.EXAMPLES)
    assert cost["real"].group == 12000 and 2 * 3000 < cost["real"].value * found.values["real_ids"] < 2 * 3100
    foretold = footers.weigh(tables.EXAMPLES, 2, tokens(some), cost, found.null)
    assert foretold == pytest.approx((tmp_path / "a.parquet").stat().st_size, rel=0.02)


@pytest.fixture(scope="module")
def run(swept: tuple[Path, Result]) -> outlook.Planned:
    """24 prompts, 8 held out: footers, records and metrics are most of what is no model."""
    config.register()
    overrides.register_help(ROOT / "conf")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        words = [*SMALL, "alpha=0.5", "seed=0", f"outputs={swept[0]}"]
        made = launch.prepare(config.load(compose("config", words)))
    assert made.finished
    return made


def left(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def test_every_stage_of_a_run_of_few_rows_weighs_what_was_foretold(run: outlook.Planned) -> None:
    """Where nothing is measured, no more than that."""
    answers = run.root / "iterate-00/answers/heldout/answers.parquet"
    have, bound = amounts.measured(run.root / "data", (Split.heldout, answers)), amounts.limits(run.config.dataset)
    assert have is not None
    kinds = set()
    for stage in run.stages:
        there = left(run.root / stage.folder)
        if not isinstance(stage.spec, SftSpec | TrainSpec):  # of a model so small its tokenizer is a third
            kinds.add(stage.kind)
            assert 0.85 < stored.of(stage, run.iterate, have) / there < 1.15, stage.name
        assert stored.of(stage, run.iterate, bound) > there, stage.name
    assert kinds == {"prepare", "generate", "score", "pairs", "evaluate"}


def test_records_and_metrics_are_as_long_as_was_foretold(run: outlook.Planned) -> None:
    for stage in run.stages:
        folder = run.root / stage.folder
        found = rundir.manifest(folder)
        assert found is not None
        told = stored.record(stage, len(found["files"]), {})
        assert told == pytest.approx((folder / rundir.MANIFEST).stat().st_size, rel=0.02), stage.name
        if isinstance(stage.spec, EvaluateSpec):
            assert stored.values(stage) == len(json.loads((folder / "metrics.json").read_bytes()))


def test_a_table_is_weighed_without_pandas() -> None:
    """Which Arrow imports to look at Python's own values, and a plan would wait for."""
    code = "import sys; from spin_reg import footers, tables\n"
    code += "footers.frame(tables.PAIRS); print('pandas' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
