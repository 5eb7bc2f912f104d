"""Where models and data come from: local folders and files, or the Hub; resolved and hashed without torch."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from spin_reg import hub, machine, templates
from spin_reg.corpora import Dataset, Hub, Jsonl, Mixture, parts
from spin_reg.errors import ConfigError, DamagedError, DataError
from spin_reg.fingerprint import digest, file_sha256
from spin_reg.settings import Model, Pretrained

MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
CODE_FILES = ("*.py",)  # where model.trust_remote_code runs them; left alone otherwise
TOKENIZER_FILES = (
    *("tokenizer*", "chat_template*", "special_tokens*", "added_tokens.json", "vocab*", "merges.txt"),
    *("*.model", "tekken.json"),
    *("generation_config.json", "config.json"),  # which tokens end an answer
)
_checked: set[tuple[Any, ...]] = set()  # what `checked_folder` found whole: a hash, and how its files looked before


def model_folder(model: Pretrained, *, weights: bool = True) -> Path:
    """The local folder that holds the model; a Hub name is downloaded at its revision (or found in the Hub's cache).

    Args:
        weights: False for those who read none: safetensors of the Hub that are not here yet are left there.

    Raises:
        ConfigError: neither a folder with a config.json and safetensors, nor a reachable Hub name; or it asks for code
            or pickles.
    """
    folder = Path(model.name_or_path).expanduser()
    if not folder.exists():
        whole = weights or model.gguf_file is not None
        folder = hub.folder(model, model_files(model), weights=whole)
        if not whole and hub.record(model, folder.name) is None:  # what lies in the cache must then be all of it
            folder = hub.folder(model, model_files(model), weights=True)
    elif model.trust_remote_code:
        raise ConfigError(
            "The code of a local folder is not run.",
            where=f"model.name_or_path={model.name_or_path}",
            why="model.trust_remote_code runs a commit of the Hub, which is pinned; a folder is not",
            todo="give the Hub's name and model.revision, or leave model.trust_remote_code out",
        )
    if model.gguf_file is not None:
        if not (folder / model.gguf_file).is_file():
            raise _no_model(folder, f"it has no {model.gguf_file}", "set model.gguf_file to a file that it has")
        return folder
    if not (folder / "config.json").exists():
        raise _no_model(folder, "it has no config.json", "give a Hugging Face folder as save_pretrained writes it")
    if not any(name.endswith(".safetensors") for name in names(model, folder)):
        why = "it has no safetensors weights; no others are read, since .bin and .pt files are pickles and can run code"
        raise _no_model(folder, why, "save it anew with save_pretrained, which writes safetensors")
    _refuse_other_weights(folder)
    _refuse_code(folder, model.trust_remote_code)
    return folder


def on_hub(model: Pretrained) -> bool:
    """Whether a model is a name of the Hub, not a local folder."""
    return not Path(model.name_or_path).expanduser().exists()


def names(model: Pretrained, folder: Path) -> set[str]:
    """The names of a model's files, those that are still on the Hub with them."""
    there = hub.record(model, folder.name) if on_hub(model) else None
    return {path.name for path in folder.iterdir()} | set(there or ())


def _no_model(where: Path, why: str, todo: str) -> ConfigError:
    return ConfigError("This folder is not a model.", where=str(where), why=why, todo=todo)


def json_object(path: Path) -> dict[str, Any]:
    """A JSON file's object.

    Raises:
        ConfigError: it is not JSON, or not an object.
    """
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _no_model(path, f"it is not JSON ({hub.first_line(error)})", "put the file back as it was") from error
    if not isinstance(found, dict):
        raise _no_model(path, f"it is a {type(found).__name__}, not an object", "put the file back as it was")
    return found


def _refuse_other_weights(folder: Path) -> None:
    """An index of sharded weights, and config.json, may name safetensors of the same folder alone."""
    wanted = json_object(folder / "config.json").get("transformers_weights") or "model.safetensors"
    named = [(folder / "config.json", str(wanted).removesuffix(".index.json"))]  # of an index its entries count
    for path in folder.glob("*.safetensors.index.json"):
        shards = json_object(path).get("weight_map")
        named += [(path, str(name)) for name in (shards.values() if isinstance(shards, dict) else [shards])]
    for path, name in named:
        if "/" in name or not name.endswith(".safetensors"):
            why = f"it names {name!r} as weights, which is no safetensors file of this folder"
            raise _no_model(path, why, "save the model anew with save_pretrained, which writes safetensors")


def _refuse_code(folder: Path, trusted: bool) -> None:
    """A folder's auto_map names Python files that the libraries would run."""
    for path in (folder / "config.json", folder / "tokenizer_config.json"):
        code = json_object(path).get("auto_map") if path.exists() else None
        named = json.dumps(code)
        if code and not trusted:
            raise ConfigError(
                "The model comes with code of its own, which is not run.",
                where=str(path),
                why=f"its auto_map names {named[:200]}",
                todo="use a model that needs none; or, for one of the Hub whose code you have read, set "
                "model.trust_remote_code=true and model.revision=COMMIT; or take auto_map out of a copy of the folder, "
                "if this transformers knows its model_type",
            )
        if "--" in named:
            raise ConfigError(
                "The model's code lies in another place of the Hub.",
                where=str(path),
                why=f"its auto_map names {named[:200]}, which model.revision does not pin",
                todo="use a model whose code lies beside its weights",
            )


def unreadable_weights(where: Path, error: Exception) -> DamagedError:
    """The error for weights that are no whole safetensors files."""
    return DamagedError(
        "The weights of a model cannot be read.",
        where=str(where),
        why=f"not whole safetensors files ({error})",
        todo="put the files back as they were",
    )


def model_revision(model: Pretrained) -> str | None:
    """The commit of a model of the Hub (its snapshot's name); None for a local folder."""
    return model_folder(model, weights=False).name if on_hub(model) else None


def model_files(model: Pretrained) -> tuple[str, ...]:
    """The files that make a model what it is; its code is one of them where it is run."""
    if model.gguf_file is not None:
        return (model.gguf_file,)
    return (*MODEL_FILES, *CODE_FILES) if model.trust_remote_code else MODEL_FILES


def files_sha256(folder: Path, patterns: tuple[str, ...]) -> str:
    """One SHA-256 over the names and contents of the files of a folder that match."""
    return _together(_files_sha256(folder, sorted(_matching(folder, patterns))))


def folder_sha256(folder: Path) -> str:
    """One SHA-256 over the names and contents of all files below a folder, also where a link in it leads."""
    seen: set[str] = set()
    paths: list[Path] = []
    for place, below, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link to where one is already
            below.clear()
            continue
        seen.add(real)
        paths += [path for path in (Path(place, name) for name in names) if path.is_file()]
    return _together(_files_sha256(folder, paths))


def _files_sha256(folder: Path, paths: list[Path]) -> dict[Path, str]:
    """SHA-256 by path in the folder; a core each, since large models lie in many files."""
    with ThreadPoolExecutor(machine.cores()) as pool:
        return {
            path.relative_to(folder): sha256 for path, sha256 in zip(paths, pool.map(file_sha256, paths), strict=True)
        }


def _matching(folder: Path, patterns: tuple[str, ...]) -> set[Path]:
    return {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}


def _together(sha256: dict[Path, str]) -> str:
    return digest([[path.as_posix(), sha256[path]] for path in sorted(sha256)])


def _model_files_sha256(model: Pretrained, patterns: tuple[str, ...]) -> str:
    """`files_sha256` of the model's whole folder. What the Hub has the hash of on record need not be here for it."""
    folder = model_folder(model, weights=False)
    there = hub.record(model, folder.name) if on_hub(model) else {}
    wanted = {n for n in there or () if any(fnmatchcase(n, pattern) for pattern in patterns)}
    known = {Path(n): file.sha256 for n, file in (there or {}).items() if n in wanted and file.sha256 is not None}
    here = {path.relative_to(folder): path for path in _matching(folder, patterns)}
    if there is None or not {Path(n) for n in wanted} <= {*known, *here}:  # it cannot be asked, or has weights in git
        return files_sha256(model_folder(model), patterns)
    return _together(_files_sha256(folder, [path for name, path in here.items() if name not in known]) | known)


def checked_folder(model: Pretrained, expected: str | None, says: str) -> Path:
    """The whole folder of a model whose files must still hash to what they did.

    They are read once a process, and again where a size or a time of theirs has changed.

    Args:
        says: where `expected` stands.

    Raises:
        DamagedError: they do not.
    """
    folder = model_folder(model)
    seen = (expected, *(_looks(path) for path in sorted(_matching(folder, model_files(model)))))
    if seen in _checked:
        return folder
    found = files_sha256(folder, model_files(model))
    if found != expected:
        raise DamagedError(
            "The base model is not the one this run was made with.",
            where=str(folder),
            why=f"its files hash to {found[:12]}, but {says} says {str(expected)[:12]}",
            todo="put the old files back, or begin a run of its own with the new ones",
        )
    _checked.add(seen)
    return folder


def _looks(path: Path) -> tuple[Any, ...]:
    """What any change of a file changes too: the time of that (`ctime`) cannot be set."""
    found = path.stat()
    return (path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def model_sha256(model: Model) -> str | None:
    """The identity of a pretrained model's files (weights, configuration, tokenizer); None where it is made here."""
    return _model_files_sha256(model, model_files(model)) if isinstance(model, Pretrained) else None


def tokenizer_sha256(model: Model) -> str:
    """The identity of a model's tokenizer and chat template, and of what the template is given."""
    if isinstance(model, Pretrained):
        code = CODE_FILES if model.trust_remote_code else ()
        own = TOKENIZER_FILES if model.gguf_file is None else model_files(model)
        files, asked = _model_files_sha256(model, (*own, *code)), templates.asked(model)
        return digest([files, asked]) if asked else files
    return "byte-level tokenizer, 1"


def data_sha256(dataset: Dataset) -> str | None:
    """The identity of the data: a file's content, a Hub data set's commit, of a mixture each part's, in its order and
    with commas between; None where it is made here."""
    if isinstance(dataset, Mixture):
        return ",".join(str(data_sha256(part)) for part in parts(dataset))
    if isinstance(dataset, Jsonl):
        path = Path(dataset.path).expanduser()
        if path.is_dir():
            todo = f"give a file in it, or dataset=hub dataset.path={dataset.path} for a folder laid out as on the Hub"
            raise DataError(
                "The data file is a folder.", where=str(path), why="dataset=jsonl reads one file", todo=todo
            )
        if not path.is_file():
            raise not_found(path)
        return file_sha256(path)
    if isinstance(dataset, Hub):
        folder = Path(dataset.path)
        return folder_sha256(folder) if folder.is_dir() else hub.data_commit(dataset.path, dataset.revision)
    return None


def not_found(path: Path) -> DataError:
    """The error for a data file that is not there."""
    todo = "set dataset.path; a run whose file was moved is told so once: spin-reg resume RUN dataset.path=FILE"
    return DataError("The data file was not found.", where=str(path), why="no such file", todo=todo)


def stamp(source: Model | Dataset) -> Any:
    """What changes when a source changes, cheap to look at: name and revision, or files' sizes and times."""
    if isinstance(source, Pretrained):
        folder = Path(source.name_or_path).expanduser()
        files = [] if source.chat_template is None else [Path(source.chat_template).expanduser()]
        named = [] if folder.exists() else [source.name_or_path, source.revision]
        files += sorted(folder.glob("*"))
        return named + [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files if p.is_file()]
    if isinstance(source, Mixture):
        stamps = [stamp(part) for part in parts(source)]
        return None if None in stamps else stamps
    if isinstance(source, Jsonl):
        path = Path(source.path).expanduser()
        return [str(path), path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else None
    if isinstance(source, Hub):
        return None if Path(source.path).is_dir() else [source.path, source.revision]
    return []
