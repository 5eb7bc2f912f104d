"""The Hugging Face Hub: which commit a name means, and what its files are, before any weights are downloaded."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from spin_reg.errors import ConfigError, DataError, SpinRegError
from spin_reg.redact import redacted
from spin_reg.settings import Pretrained

HEAVY = ("*.safetensors",)
log = logging.getLogger(__name__)
_commits: dict[tuple[str, str | None], str] = {}  # what a name and a revision mean, for as long as this process lives
_records: dict[tuple[str, str], Mapping[str, "File"] | None] = {}  # a commit's files never change
_headers: dict[tuple[str, str, str], dict[str, list[int]]] = {}


@dataclass(frozen=True)
class File:
    """A file of a commit as the Hub has it on record; `sha256` is None of the small ones, which are kept in git."""

    size: int
    sha256: str | None


def first_line(error: Exception) -> str:
    """The first line of an error's text, short and without secrets."""
    return (redacted(str(error)).splitlines() or [""])[0][:200]


def pin(model: Pretrained, commit: str) -> None:
    """From now on the model's revision means this commit: a run goes on with the one that it began with."""
    _commits[model.name_or_path, model.revision] = commit


def forget() -> None:
    """Ask the Hub anew."""
    for known in (_commits, _records, _headers):
        known.clear()


def folder(model: Pretrained, patterns: tuple[str, ...], *, weights: bool) -> Path:
    """The snapshot of a model in the Hub's cache, with its files that match; what is missing is downloaded.

    Args:
        weights: False leaves out those that are not there yet. The folder is named by its commit either way.

    Raises:
        ConfigError: the Hub does not have it, or cannot be reached and the cache is not whole.
    """
    from huggingface_hub import snapshot_download

    key = (model.name_or_path, model.revision)
    wanted = partial(
        snapshot_download,
        model.name_or_path,
        revision=_commits.get(key, model.revision),
        allow_patterns=list(patterns),
        ignore_patterns=None if weights else list(HEAVY),
    )
    try:
        found = Path(wanted())
    except Exception as error:  # the Hub's client raises a dozen kinds; each means the model is not to be had
        try:  # before 2.0 it asks for the list of a whole commit's files, though it may have them all
            found = Path(wanted(local_files_only=True))
        except Exception:
            raise _not_found(model, error) from error
    _commits[key] = found.name
    return found


def _not_found(model: Pretrained, error: Exception) -> ConfigError:
    here = Path(model.name_or_path).expanduser()
    return ConfigError(
        "The model was not found.",
        where=f"model.name_or_path={model.name_or_path}",
        why=f"there is no folder {here}, and the Hub answered {type(error).__name__}: {first_line(error)}",
        todo="give a local folder, or a Hub name (and model.revision) that this machine can reach; a run whose base "
        "was moved is told so once: spin-reg resume RUN model.name_or_path=FOLDER",
    )


def record(model: Pretrained, commit: str) -> Mapping[str, File] | None:
    """The files at the top of a commit, by name, as the Hub has them on record; None where it cannot be asked."""
    from huggingface_hub import HfApi

    key = (model.name_or_path, commit)
    if key not in _records:
        try:
            found = HfApi().model_info(model.name_or_path, revision=commit, files_metadata=True).siblings or []
        except Exception as error:  # as above; what is in the cache can be used without
            log.info("the Hub does not answer (%s: %s): its cache is used", type(error).__name__, first_line(error))
            _records[key] = None
        else:
            top = [file for file in found if "/" not in file.rfilename]
            _records[key] = {f.rfilename: File(f.size or 0, f.lfs.sha256 if f.lfs else None) for f in top}
    return _records[key]


def size(model: Pretrained, commit: str, name: str) -> int:
    """Bytes of a file of a commit; 0 where the Hub cannot be asked."""
    found = (record(model, commit) or {}).get(name)
    return 0 if found is None else found.size


def shapes(model: Pretrained, commit: str, name: str) -> dict[str, list[int]]:
    """The shape of every weight in a safetensors file of a commit, from its header alone.

    Raises:
        ConfigError: the Hub does not answer, or not with such a header.
    """
    from huggingface_hub import HfApi

    key = (model.name_or_path, commit, name)
    if key not in _headers:
        try:
            header = HfApi().parse_safetensors_file_metadata(model.name_or_path, name, revision=commit)
        except Exception as error:  # as above
            raise _not_found(model, error) from error
        _headers[key] = {weight: list(tensor.shape) for weight, tensor in header.tensors.items()}
    return _headers[key]


def data_commit(path: str, revision: str | None) -> str:
    """The commit that a revision of a data set means.

    Raises:
        DataError: the Hub does not have it, or cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(path, revision=revision).sha)
    except Exception as error:  # as above
        raise DataError(
            "The data set was not found on the Hub.",
            where=f"dataset.path={path}",
            why=f"the Hub answered {type(error).__name__}: {first_line(error)}",
            todo="check the name, dataset.revision and the network; a local copy works with dataset=jsonl",
        ) from error


def readme(model: Pretrained) -> str:
    """The model card of a base on the Hub, at the commit in use; empty where it has none, or cannot be reached."""
    from huggingface_hub import hf_hub_download

    commit = _commits.get((model.name_or_path, model.revision), model.revision)
    try:
        path = hf_hub_download(model.name_or_path, "README.md", revision=commit)
    except Exception as error:  # a dozen kinds; without a card its licence is not known, and nothing else changes
        log.info("the model card of %s is not to be had (%s)", model.name_or_path, first_line(error))
        return ""
    return Path(path).read_text(encoding="utf-8", errors="replace")


def check_token(name: str) -> None:
    """Refuse to push where there is no token, before anything is made.

    Raises:
        ConfigError: neither the environment nor a login has one.
    """
    from huggingface_hub import get_token

    if not get_token():
        raise ConfigError(
            "There is no token for the Hub.",
            where=f"--push-to-hub {name}",
            why="neither HF_TOKEN is set nor is anybody logged in",
            todo="set HF_TOKEN in the environment, or log in once: hf auth login",
        )


def push(folder: Path, name: str, *, dataset: bool, private: bool, message: str) -> str:
    """Upload a folder as one commit to a repository, made where it is not there yet; returns the commit's address.

    Args:
        private: of a repository that is made now; one that is there stays as it is.

    Raises:
        SpinRegError: the Hub refuses it, or cannot be reached. The folder stays.
    """
    from huggingface_hub import HfApi

    kind = "dataset" if dataset else "model"
    try:
        HfApi().create_repo(name, repo_type=kind, private=private, exist_ok=True)
        made = HfApi().upload_folder(repo_id=name, folder_path=folder, repo_type=kind, commit_message=message)
    except Exception as error:  # as above
        raise SpinRegError(
            "The export could not be pushed.",
            where=f"--push-to-hub {name}",
            why=f"{type(error).__name__}: {first_line(error)}",
            todo=f"the folder {folder} is whole: hf upload {name} {folder} --repo-type {kind}",
        ) from error
    return str(made.commit_url)
