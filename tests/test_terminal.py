"""What a terminal is sent: colours while a run is at work, and none where NO_COLOR asks for none."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SMALL

COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])[;m]")


def shown(words: list[str], environment: dict[str, str]) -> str:
    """What the command sends to a terminal of its own."""
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "CI")}
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "spin_reg", *words],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=kept | {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT)} | environment,
    )
    os.close(theirs)
    said = b""
    while True:
        try:
            some = os.read(ours, 65536)
        except OSError:  # the other end is closed
            some = b""
        if not some:
            break
        said += some
    os.close(ours)
    assert child.wait(60) == 0, said.decode()
    return said.decode()


@pytest.mark.slow
def test_colours_and_none(tmp_path: Path) -> None:
    plain = shown(["train", *SMALL, f"outputs={tmp_path / 'plain'}"], {"NO_COLOR": "1"})
    coloured = shown(["train", *SMALL, f"outputs={tmp_path / 'coloured'}"], {})
    assert COLOUR.search(coloured) and not COLOUR.search(plain)
    assert all("heldout" in text and "iterate-02/model" in text for text in (plain, coloured))
