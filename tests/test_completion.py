"""Completion: what is offered at the cursor, and that real shells offer it."""

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, Command

from spin_reg import completion


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two runs, a file, and a command `spin-reg` on the path."""
    for name in ("one", "two"):
        (tmp_path / "outputs" / name).mkdir(parents=True)
        (tmp_path / "outputs" / name / "run.json").write_text("{}")
    (tmp_path / "mine.jsonl").touch()
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin/spin-reg"
    code = "import sys; sys.argv[0] = 'spin-reg'; from spin_reg.cli import main; main()"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("spin-reg ex", ["export"]),
        ("spin-reg --com", ["--completion"]),
        ("spin-reg --completion ", ["bash", "zsh", "fish"]),
        ("spin-reg export ", ["outputs/one", "outputs/two"]),
        ("spin-reg export outputs/t", ["outputs/two"]),
        ("spin-reg export outputs/two --it", ["--iterate", "--iteration"]),
        ("spin-reg export outputs/two --iterate ", ["best", "last", "base"]),
        ("spin-reg export outputs/two --by heldout_nll_", ["heldout_nll_change"]),
        ("spin-reg export outputs/two --to bi", ["bin/"]),
        ("spin-reg export --format t", ["trl"]),
        ("spin-reg sample outputs/one --prompts m", ["mine.jsonl"]),
        ("spin-reg resume outputs/o", ["outputs/one"]),
        ("spin-reg plan --pr", ["--prepare"]),
        ("spin-reg gc keep", ["keep_iterates=needed", "keep_iterates=last"]),
        ("spin-reg train --cfg ", ["job", "hydra", "all"]),
        ("spin-reg nothing ", []),
    ],
)
def test_what_may_stand_at_the_cursor(line: str, offered: list[str], place: Path) -> None:
    assert completion.offers(line) == (offered, "")


@pytest.mark.parametrize(
    ("line", "hydras"),
    [
        ("spin-reg train sch", "spin-reg sch"),
        ("spin-reg train -m regularizer=kl sch", "spin-reg regularizer=kl sch"),
        ("spin-reg resume outputs/one schedule.it", "spin-reg schedule.it"),
        ("spin-reg evaluate evaluation=", "spin-reg evaluation="),
    ],
)
def test_settings_are_asked_of_hydra_which_sees_no_verb(line: str, hydras: str, place: Path) -> None:
    assert completion.offers(line) == (None, hydras)


def test_a_shell_that_has_no_script_is_told_which_have(command: Command) -> None:
    result = command("--completion", "csh")
    assert result.code == 2 and "bash, zsh, fish" in result.err
    assert command("--completion", "bash").out == completion.BASH


def typed(shell: list[str], setup: str, keys: str, wanted: str) -> str:
    """What a real interactive shell shows after these keys, read until it shows what is wanted or a minute is over."""
    pid, terminal = pty.fork()
    if pid == 0:  # in the child, which becomes the shell
        os.environ |= {"TERM": "dumb", "PS1": "READY ", "COLUMNS": "200"}
        os.execvp(shell[0], shell)
    shown = ""

    def until(text: str) -> None:
        nonlocal shown
        end = time.monotonic() + 60
        while text not in shown and time.monotonic() < end and select.select([terminal], [], [], 1) is not None:
            if select.select([terminal], [], [], 0)[0]:
                shown += os.read(terminal, 65536).decode(errors="replace").replace("\a", "")  # a bell in between

    try:
        until("READY ")
        os.write(terminal, f"{setup}; echo SET''UP\n".encode())
        until("SETUP")
        shown = ""
        os.write(terminal, keys.encode())
        until(wanted)
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        os.close(terminal)
    return shown


CASES = [("spin-reg exp", "spin-reg export "), ("spin-reg resume outputs/t", "outputs/two ")]
SETTING = ("spin-reg train schedule.be", "schedule.beta=")


@pytest.mark.slow
@pytest.mark.parametrize("shell", [["bash", "--norc", "--noprofile", "-i"], ["zsh", "-f", "-i"]], ids=lambda s: s[0])
@pytest.mark.parametrize(("keys", "wanted"), [*CASES, SETTING])
def test_a_real_shell_completes_on_tab(shell: list[str], keys: str, wanted: str, place: Path) -> None:
    if shutil.which(shell[0]) is None:
        pytest.skip(f"{shell[0]} is not installed")
    shown = typed(shell, f'eval "$(spin-reg --completion {shell[0]})"', keys + "\t", wanted)
    assert wanted in shown


@pytest.mark.slow
@pytest.mark.parametrize(("keys", "wanted"), [*CASES, SETTING])
def test_fish_offers_it(keys: str, wanted: str, place: Path) -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    code = f"spin-reg --completion fish | source; complete -C '{keys}'"
    done = subprocess.run(["fish", "--no-config", "-c", code], capture_output=True, text=True, timeout=60)
    assert wanted.split()[-1] in done.stdout.split(), done.stderr
