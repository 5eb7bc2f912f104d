"""What CONTRIBUTING.md tells people to write works as it stands there (slow)."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, read_jsonl

pytestmark = pytest.mark.slow

TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def section(title: str) -> list[str]:
    """The fenced blocks of a section."""
    part = TEXT.split(f"## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"```\w+\n(.*?)```", part, flags=re.S)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with all that CONTRIBUTING.md adds."""
    place = tmp_path_factory.mktemp("project")
    for name in ("spin_reg", "conf"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    code, yaml = section("A regularizer")
    (place / "spin_reg/regularizers/newest_and_base.py").write_text(code)
    (place / "conf/regularizer/newest_and_base.yaml").write_text(yaml)
    (place / "conf/dataset/gsm8k.yaml").write_text(section("A data set")[0])
    code, yaml = section("A loss")
    losses = (place / "spin_reg/losses.py").read_text()
    losses = losses.replace("LOSSES: dict", f"{code}\n\nLOSSES: dict").replace(
        "exponential, ipo)", "exponential, ipo, squared_hinge)"
    )
    (place / "spin_reg/losses.py").write_text(losses)
    settings = (place / "spin_reg/settings.py").read_text()
    (place / "spin_reg/settings.py").write_text(
        settings.replace('    ipo = "ipo"', '    ipo = "ipo"\n    squared_hinge = "squared_hinge"')
    )
    (place / "conf/loss/squared_hinge.yaml").write_text(yaml)
    stage = (place / "spin_reg/stages/evaluate.py").read_text()
    stage = stage.replace("answers_look(inputs", 'longest(inputs["own"]) | answers_look(inputs', 1)
    code, yaml = section("A metric")
    (place / "spin_reg/stages/evaluate.py").write_text(f"{stage}\n\n{code}")
    (place / "conf/evaluation/common_sense.yaml").write_text(yaml)
    return place


def run(project: Path, *words: str) -> str:
    env = os.environ | {"PYTHONPATH": str(project)}
    done = subprocess.run(
        [sys.executable, "-m", "spin_reg", *words], cwd=project, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_regularizer_a_loss_and_a_metric_run(project: Path) -> None:
    run(project, "train", *SMALL, "regularizer=newest_and_base", "loss=squared_hinge", "run_name=new")
    rows = read_jsonl(project / "outputs/new/metrics.jsonl")
    assert all(row["eval/length_max"] >= row["eval/length_mean"] for row in rows if "iterate" in row)
    first = next(row for row in rows if "train/loss" in row)
    assert first["train/loss"] == pytest.approx(1.0, abs=1e-5)  # max(0, 1 - 0)^2


def test_a_data_set_and_a_list_of_benchmarks_compose(project: Path) -> None:
    assert "openai/gsm8k" in run(project, "train", "--cfg", "job", "dataset=gsm8k")
    assert "task: piqa" in run(project, "train", "--cfg", "job", "evaluation=common_sense")
    assert "newest_and_base" in run(project, "train", "--help")
