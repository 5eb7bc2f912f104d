"""The wheel, and the wheel built from the sdist, carry conf/ and run outside the checkout (slow)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SMALL

from spin_reg import cli

pytestmark = pytest.mark.slow


def run(*words: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    done = subprocess.run([sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as a wheel built from the sdist, unpacked into a folder of its own."""
    place = tmp_path_factory.mktemp("wheel")
    run("-m", "build", "--no-isolation", "--outdir", str(place / "dist"), str(ROOT), cwd=place)
    (wheel,) = (place / "dist").glob("*.whl")
    run("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place / "site"), str(wheel), cwd=place)
    return place / "site"


def test_the_wheel_holds_the_whole_tree_of_settings(installed: Path) -> None:
    wanted = {p.relative_to(ROOT / "conf") for p in (ROOT / "conf").rglob("*.yaml")}
    assert {p.relative_to(installed / "spin_reg/conf") for p in (installed / "spin_reg/conf").rglob("*.yaml")} == wanted


def test_the_installed_command_composes_and_runs_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    where = "import spin_reg.cli as c; print(c.conf_dir())"
    assert run("-c", where, cwd=tmp_path, path=installed).stdout.strip() == str(installed / "spin_reg" / "conf")
    assert "regularizer" in run("-m", "spin_reg", "train", "--cfg", "job", cwd=tmp_path, path=installed).stdout
    run("-m", "spin_reg", "train", *SMALL, "run_name=run", cwd=tmp_path, path=installed)
    assert (tmp_path / "outputs/run/iterate-02/model/model.safetensors").exists()
    assert "</html>" in (tmp_path / "outputs/run/report.html").read_text()


def test_a_checkout_reads_its_own_conf_and_never_a_frozen_copy() -> None:
    assert cli.conf_dir() == ROOT / "conf"
