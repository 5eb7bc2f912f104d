"""Where models and data come from: local folders and files, or the Hub; resolved and hashed without torch."""

import json
import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from spin_reg.errors import ConfigError, DamagedError, DataError
from spin_reg.fingerprint import digest, file_sha256
from spin_reg.redact import redacted
from spin_reg.settings import Dataset, Generation, Hub, Jsonl, Model, Pretrained, Tiny

MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
CODE_FILES = ("*.py",)  # where model.trust_remote_code runs them; left alone otherwise
TOKENIZER_FILES = (
    *("tokenizer*", "chat_template*", "special_tokens*", "added_tokens.json", "vocab*", "merges.txt"),
    *("*.model", "tekken.json"),
    *("generation_config.json", "config.json"),  # which tokens end an answer
)
TINY_POSITIONS, TINY_VOCABULARY = 4096, 261  # of the model made on the spot: 256 bytes and 5 marks


def model_folder(model: Pretrained) -> Path:
    """The local folder that holds the model; a Hub name is downloaded at its revision (or found in the Hub's cache).

    Raises:
        ConfigError: neither a folder with a config.json and safetensors, nor a reachable Hub name; or it asks for code
            or pickles.
    """
    folder = Path(model.name_or_path).expanduser()
    if not folder.exists():
        folder = _from_hub(model, folder)
    elif model.trust_remote_code:
        raise ConfigError(
            "The code of a local folder is not run.",
            where=f"model.name_or_path={model.name_or_path}",
            why="model.trust_remote_code runs a commit of the Hub, which is pinned; a folder is not",
            todo="give the Hub's name and model.revision, or leave model.trust_remote_code out",
        )
    if not (folder / "config.json").exists():
        raise _no_model(folder, "it has no config.json", "give a Hugging Face folder as save_pretrained writes it")
    if not list(folder.glob("*.safetensors")):
        why = "it has no safetensors weights; no others are read, since .bin and .pt files are pickles and can run code"
        raise _no_model(folder, why, "save it anew with save_pretrained, which writes safetensors")
    _refuse_other_weights(folder)
    _refuse_code(folder, model.trust_remote_code)
    return folder


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
        raise _no_model(path, f"it is not JSON ({_first_line(error)})", "put the file back as it was") from error
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


def weight_files(model: Pretrained) -> list[Path]:
    """The safetensors files that hold a model's weights."""
    folder = model_folder(model)
    for index in folder.glob("*.safetensors.index.json"):
        return [folder / name for name in sorted(set(json_object(index)["weight_map"].values()))]
    single = folder / "model.safetensors"
    return [single] if single.exists() else sorted(folder.glob("*.safetensors"))


def parameters(model: Model) -> int:
    """How many weights an iterate of this model has, from the headers of its files.

    Raises:
        DamagedError: they are no safetensors files.
    """
    if isinstance(model, Tiny):
        h, v = model.hidden_size, TINY_VOCABULARY
        return model.num_layers * (4 * h * h + 3 * h * 8 * (h // 3) + 2 * h) + 2 * v * h + h
    assert isinstance(model, Pretrained)
    total = 0
    for path in weight_files(model):
        try:
            with safe_open(path, framework="np") as file:
                names = file.keys()
                total += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
        except (SafetensorError, OSError) as error:
            raise unreadable_weights(path, error) from error
    return total


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
    return None if Path(model.name_or_path).expanduser().exists() else model_folder(model).name


def _from_hub(model: Pretrained, folder: Path) -> Path:
    from huggingface_hub import snapshot_download

    try:
        allowed = list(model_files(model))
        return Path(snapshot_download(model.name_or_path, revision=model.revision, allow_patterns=allowed))
    except Exception as error:  # the Hub's client raises a dozen kinds; each means the model is not to be had
        raise ConfigError(
            "The model was not found.",
            where=f"model.name_or_path={model.name_or_path}",
            why=f"there is no folder {folder}, and the Hub answered {type(error).__name__}: {_first_line(error)}",
            todo="give a local folder, or a Hub name (and model.revision) that this machine can reach",
        ) from error


def _first_line(error: Exception) -> str:
    return (redacted(str(error)).splitlines() or [""])[0][:200]


def model_files(model: Pretrained) -> tuple[str, ...]:
    """The files that make a model what it is; its code is one of them where it is run."""
    return (*MODEL_FILES, *CODE_FILES) if model.trust_remote_code else MODEL_FILES


def files_sha256(folder: Path, patterns: tuple[str, ...]) -> str:
    """One SHA-256 over the names and contents of the files of a folder that match."""
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    return digest([[path.relative_to(folder).as_posix(), file_sha256(path)] for path in files])


def model_sha256(model: Model) -> str | None:
    """The identity of a pretrained model's files (weights, configuration, tokenizer); None where it is made here."""
    return files_sha256(model_folder(model), model_files(model)) if isinstance(model, Pretrained) else None


def tokenizer_sha256(model: Model) -> str:
    """The identity of a model's tokenizer and chat template."""
    if isinstance(model, Pretrained):
        code = CODE_FILES if model.trust_remote_code else ()
        return files_sha256(model_folder(model), (*TOKENIZER_FILES, *code))
    return "byte-level tokenizer, 1"


def positions(model: Model) -> int | None:
    """How many tokens a model can read at once, as its config.json says it (with its RoPE scaling); None: no limit."""
    if not isinstance(model, Pretrained):
        return TINY_POSITIONS
    path = model_folder(model) / "config.json"
    try:
        settings: dict[str, Any] = json.loads(path.read_bytes())
        settings = settings.get("text_config") or settings  # of a model that reads pictures too
        found = settings.get("max_position_embeddings", settings.get("n_positions"))
        if found is None:
            return None
        scaling = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
        scaled = scaling.get("original_max_position_embeddings", found) * (scaling.get("factor") or 1)
        return max(int(found), int(scaled))
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            "The model's config.json cannot be read.",
            where=str(path),
            why=" ".join(str(error).split())[:200],
            todo="put the file back as save_pretrained wrote it",
        ) from error


def check_positions(model: Model, dataset: Dataset, generation: Generation) -> None:
    """A prompt at its limit with an answer at its limit, real or generated, must fit the model's positions.

    Raises:
        ConfigError: it does not; learned positions would end in an IndexError, rotary ones in worse and worse text.
    """
    room = positions(model)
    answers = {"dataset.max_response_tokens": dataset.max_response_tokens}
    answers["generation.max_new_tokens"] = generation.max_new_tokens or dataset.max_response_tokens
    key = max(answers, key=lambda name: answers[name])
    needed = dataset.max_prompt_tokens + answers[key]
    if room is not None and needed > room:
        raise ConfigError(
            "A prompt and its answer may not fit the model.",
            where=f"dataset.max_prompt_tokens={dataset.max_prompt_tokens}, {key}={answers[key]}",
            why=f"they may have {needed} tokens together, and the model has {room} positions",
            todo="lower one of these two limits, or choose a model with more positions",
        )


def data_sha256(dataset: Dataset) -> str | None:
    """The identity of the data: a file's content, a Hub data set's commit; None where it is made here."""
    if isinstance(dataset, Jsonl):
        path = Path(dataset.path).expanduser()
        if path.is_dir():
            todo = f"give a file in it, or dataset=hub dataset.path={dataset.path} for a folder laid out as on the Hub"
            raise DataError(
                "The data file is a folder.", where=str(path), why="dataset=jsonl reads one file", todo=todo
            )
        if not path.is_file():
            raise DataError(
                "The data file was not found.", where=str(path), why="no such file", todo="set dataset.path"
            )
        return file_sha256(path)
    if isinstance(dataset, Hub):
        return _hub_commit(dataset)
    return None


def _hub_commit(dataset: Hub) -> str:
    if Path(dataset.path).is_dir():
        return files_sha256(Path(dataset.path), ("**/*",))
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(dataset.path, revision=dataset.revision).sha)
    except Exception as error:  # as above
        raise DataError(
            "The data set was not found on the Hub.",
            where=f"dataset.path={dataset.path}",
            why=f"the Hub answered {type(error).__name__}: {_first_line(error)}",
            todo="check the name, dataset.revision and the network; a local copy works with dataset=jsonl",
        ) from error
