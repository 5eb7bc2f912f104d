"""`sample`: where prompts come from, how answers are shown, and what cannot be asked (the draws: test_takeaway.py)."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, Result


@pytest.fixture
def run(swept: tuple[Path, Result]) -> Path:
    (found,) = swept[0].glob("tiny-toy-kl-alpha0.5-seed0-*")
    return found


def rows(command: Command, *words: str) -> list[dict[str, Any]]:
    result = command("sample", *words, "--json")
    assert result.code == 0, result.err
    return [json.loads(line) for line in result.out.splitlines()]


def test_two_iterates_stand_side_by_side(run: Path, command: Command) -> None:
    both = ["--iterate", "base", "--iterate", "last", "--prompt", "A1"]
    assert [row["iterate"] for row in rows(command, str(run), *both)] == [0, 2]
    shown = command("sample", str(run), *both)
    assert "iterate 0" in shown.out and "iterate 2" in shown.out and "\x1b" not in shown.out


@pytest.mark.slow
def test_prompts_come_from_a_file_or_are_piped_in(
    run: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.jsonl"
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "B2"}]
    path.write_text('{"prompt": "A1"}\n' + json.dumps({"messages": chat}) + "\n")
    found = rows(command, str(run), "--prompts", str(path))
    assert [row["messages"] for row in found] == [[{"role": "user", "content": "A1"}], chat]
    monkeypatch.setattr("sys.stdin", io.StringIO("A1\n"))
    assert rows(command, str(run))[0] == found[0]
    monkeypatch.setattr("sys.stdin", io.StringIO("A1\n"))
    plain = command("sample", str(run), "--prompt", "-", "--max-new-tokens", "4")
    assert plain.code == 0 and "A1" not in plain.out


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--prompt", "<|end|>"], 3, "control token"),
        (["--prompt", " "], 2, "empty"),
        (["--prompt", "A1", "--temperature", "-1"], 2, "--temperature -1.0"),
        (["--prompt", "A1", "--temperature", "0", "--top-p", "0.5"], 2, "likeliest"),
        (["--prompt", "A1", "--max-new-tokens", "100000"], 3, "the model reads"),
        (["--prompt", "A1", "--iterate", "9"], 2, "with their weights: 0, 1, 2"),
        (["--prompt", "A1", "--by", "kl_off"], 2, "only best is by one"),
        (["--prompts", "nothing.jsonl"], 3, "no such file"),
    ],
)
def test_what_cannot_be_asked_is_said(words: list[str], code: int, said: str, run: Path, command: Command) -> None:
    result = command("sample", str(run), *words)
    assert result.code == code and said in result.err, result.err


def test_a_row_that_is_no_prompt_is_named(run: Path, command: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"prompt": "A1"}\n{"question": "B2"}\n')
    result = command("sample", str(run), "--prompts", str(tmp_path / "mine.jsonl"))
    assert result.code == 3 and "row 2" in result.err
