"""Canary secrets in the environment and in URLs show up in no file and on no screen."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SMALL, Command
from test_safety import a_record, four, pickles

from spin_reg import redact
from spin_reg.redact import redacted

CANARY = "canary-5f2c9d"
ENVIRONMENT = {
    "WANDB_API_KEY": f"{CANARY}-of-forty-characters-0123456789abcde",
    "HF_TOKEN": f"hf_{CANARY}",
    "OPENAI_API_KEY": f"sk-{CANARY}",
    "HTTPS_PROXY": f"http://user:{CANARY}@127.0.0.1:9",
    "WANDB_BASE_URL": f"https://user:{CANARY}@wandb.example.com",
}
URL = f"https://user:{CANARY}@example.com/rows.jsonl"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def outputs(tmp_path: Path) -> Iterator[Path]:
    """A folder that must not hold the canary when the test is over."""
    yield tmp_path / "outputs"
    assert not leaks(tmp_path)


def leaks(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and CANARY.encode() in p.read_bytes()]


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (f"get https://user:{CANARY}@host/x?a=1 now", "get https://***@host/x?a=1 now"),
        (f"git+ssh://{CANARY}@host:22/x", "git+ssh://***@host:22/x"),
        ("https://u:p@ss@host/x", "https://***@host/x"),
        (f"https://host/x?a=1&token={CANARY}&b=2", "https://host/x?a=1&token=***&b=2"),
        ("https://h/x?X-Amz-Signature=abc&api_key=def#f", "https://h/x?X-Amz-Signature=***&api_key=***#f"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("https://host:8080/a@b?page=2", "https://host:8080/a@b?page=2"),
        (f"key is sk-{CANARY}!", "key is ***!"),
        (f"proxy wants {CANARY}", "proxy wants ***"),
        ("no secret", "no secret"),
    ],
)
def test_secrets_are_masked_and_nothing_else(text: str, clean: str) -> None:
    assert redacted(text) == clean
    assert (redact.found(text) is not None) is (text != clean)


@pytest.mark.parametrize("name", ["A_KEY", "my_token", "TheSecret", "DB_PASSWORD", "OLD_PASSWD", "AWS_CREDENTIALS"])
def test_names_say_what_is_secret(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(name, "12345678")
    assert redacted("a 12345678 b") == "a *** b"
    monkeypatch.setenv(name, "1234567")  # so short that it stands in other words
    assert redacted("a 1234567 b") == "a 1234567 b"
    monkeypatch.setenv(name, str(tmp_path))  # where the secret lies
    assert redacted(f"in {tmp_path}/x") == f"in {tmp_path}/x"
    monkeypatch.setenv("PLAIN", "12345678")
    monkeypatch.delenv(name)
    assert redacted("a 12345678 b") == "a 12345678 b"


@pytest.mark.parametrize("key", ["dataset.path", "model.name_or_path", "run_name", "+hydra.x", "tracker.project"])
@pytest.mark.parametrize("secret", [URL, ENVIRONMENT["HF_TOKEN"], "https://h/x?token=t"], ids=["url", "value", "query"])
def test_a_word_with_a_secret_is_refused(key: str, secret: str, command: Command, outputs: Path) -> None:
    for more in ([], ["--cfg", "job"], ["-m"]):
        result = command("train", f"outputs={outputs}", "dataset=jsonl", f"{key}='{secret}'", *more)
        four(result, 2, "holds a secret", key)
        assert CANARY not in result.out + result.err and "token=t" not in result.err
    assert not outputs.exists()


def test_a_yaml_with_a_secret_and_a_look_at_the_environment_are_refused(
    command: Command, outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = tmp_path / "conf/dataset"
    conf.mkdir(parents=True)
    monkeypatch.setenv("MINE_TOKEN", "not-the-canary")
    (conf / "mine.yaml").write_text("defaults: [jsonl]\npath: https://user:not-the-canary@host/x\n")
    flags = ["--config-dir", str(tmp_path / "conf"), f"outputs={outputs}"]
    for words in (["dataset=mine"], ["dataset=jsonl", "dataset.path=x-${oc.env:MINE_TOKEN}"]):
        result = command("train", *flags, *words)
        four(result, 2, "holds a secret", "dataset.path")
        assert "not-the-canary" not in result.out + result.err


@pytest.mark.parametrize(
    "words",
    [
        [URL],
        ["train", URL],
        ["train", f"+{CANARY}=1"],
        ["train", f"sk-{CANARY}=1"],
        ["train", f"model=sk-{CANARY}"],
        ["train", f"seed=sk-{CANARY}"],
        ["train", f"--config-name=sk-{CANARY}"],
        ["resume", URL],
        ["status", URL],
    ],
)
@pytest.mark.parametrize("full", [True, False])
def test_errors_do_not_echo_a_secret(
    words: list[str], full: bool, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    if full:
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    result = command(*words)
    assert result.code != 0 and result.err and CANARY not in result.out + result.err


def test_a_record_with_a_secret_is_refused(command: Command, tmp_path: Path) -> None:
    a_record(tmp_path / "run", overrides=["dataset=jsonl", f"dataset.path={URL}"])
    result = command("resume", str(tmp_path / "run"))
    four(result, 2, "holds a secret", "dataset.path")
    assert CANARY not in result.err


@pytest.mark.parametrize("full", [True, False])
def test_a_crash_with_the_secret_in_its_text(
    full: bool, command: Command, outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spin_reg.stages import sft

    def fails(*args: object) -> None:
        logging.getLogger("spin_reg.x").warning("asking %s", URL)
        raise OSError("x" * 390 + f" {ENVIRONMENT['OPENAI_API_KEY']} no answer from {URL}")  # cut inside the key

    monkeypatch.setattr(sft, "run", fails)
    if full:
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["spin-reg"])
    result = command("train", *SMALL, f"outputs={outputs}", "run_name=run")
    log = (outputs / "run/run.log").read_text()
    assert result.code == 1 and "OSError" in result.err and "no answer from https://***@" in log and "asking" in log
    assert "Traceback" in log and ("Traceback" in result.err) is full
    for word in (CANARY, "sk-"):
        assert word not in result.out + result.err + log


def test_a_hub_that_answers_with_the_secret(command: Command, outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise OSError("y" * 190 + f" {ENVIRONMENT['HF_TOKEN']} was refused by {URL}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", fails)
    monkeypatch.setattr("datasets.load_dataset_builder", fails)
    for words in (["model=pretrained", "model.name_or_path=a/b"], ["dataset=hub", "dataset.path=a/b"]):
        result = command("train", "tracker=none", f"outputs={outputs}", *words)
        assert result.code in (2, 3) and "OSError" in result.err and "yyy" in result.err
        assert "canary" not in result.err and "hf_" not in result.err


@pytest.mark.slow
def test_a_whole_run_with_wandb_holds_no_secret_and_no_pickle(outputs: Path, tmp_path: Path) -> None:
    """A process of its own, below a repository whose address holds a password."""
    subprocess.run(["git", "init", "--quiet", str(tmp_path / "repository")], check=True)
    address = f"https://user:{CANARY}@example.com/x.git"
    (tmp_path / "home").mkdir()
    subprocess.run(["git", "-C", str(tmp_path / "repository"), "remote", "add", "origin", address], check=True)
    code = "import sys\nfrom spin_reg import cli\nsys.argv = ['spin-reg', *sys.argv[1:]]\ncli.main()"
    words = [word for word in SMALL if not word.startswith("tracker")]
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), "WANDB_MODE": "offline"} | ENVIRONMENT
    done = subprocess.run(
        [sys.executable, "-c", code, "train", *words, "tracker.log_model=true", f"outputs={outputs}", "run_name=run"],
        cwd=tmp_path / "repository",
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    assert list((outputs / "run/wandb").rglob("*.wandb"))
    assert CANARY not in done.stdout + done.stderr
    assert pickles(outputs) == []
    (tmp_path / "repository/.git/config").unlink()  # which holds it because we put it there
