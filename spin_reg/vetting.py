"""No code comes in by configuration: words and YAML files that could make Hydra call something are refused before it
reads them."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from spin_reg import redact
from spin_reg.complaints import holds_a_secret
from spin_reg.errors import ConfigError

TARGET = "_target_"
CALLING = {"()", "class"}  # keys of Python's logging configuration, which Hydra applies: what they name is called
PLAIN = "tag:yaml.org,2002:"


def check(words: Sequence[str], groups: Sequence[str]) -> None:
    """Refuse what could run code, and secrets: in the words, and in the YAML files of the folders that they name.

    Raises:
        ConfigError: naming the word or the file.
    """
    for word in words:
        _check_word(word, groups)
    given = get_args_parser().parse_args(list(words))
    if given.experimental_rerun is not None:
        raise ConfigError(
            "A pickle is not read.",
            where="--experimental-rerun",
            why="opening a pickle can run any code",
            todo="spin-reg resume RUN does a run again",
        )
    name = given.config_name or ""
    if name.startswith("/") or ".." in name.split("/"):
        raise _outside(f"--config-name {name}")
    searched = [place for word in words if "searchpath" in word for place in _places(word)]
    for place in filter(None, [given.config_dir, given.config_path, *searched]):
        folder = Path(place.removeprefix("file://"))
        for path in {*_yaml_files(folder), *_yaml_files(Path(__file__).parent / folder)}:  # Hydra knows both
            _check_file(path)


def _places(word: str) -> list[str]:
    """The folders that a word has Hydra search, as Hydra reads it."""
    try:
        value = OverridesParser.create().parse_override(word).value()
    except HydraException:
        return []  # it cannot be read, so nothing is searched
    places = value if isinstance(value, list) else [value]
    if not all(isinstance(place, str) and "$" not in place for place in places):  # several values, or made of others
        raise _outside(word)
    return [str(place) for place in places]


def check_saved(words: Sequence[str], record: Path) -> None:
    """Refuse words of a run's record that no run writes there: flags, and settings of Hydra's own.

    Raises:
        ConfigError: naming the record.
    """
    for word in words:
        if not isinstance(word, str) or word.lstrip("+~/").startswith(("-", "hydra")) or TARGET in word:
            raise _calls(f"{record}, overrides: {word}", "a run records its own settings alone, never Hydra's")


def _check_word(word: str, groups: Sequence[str]) -> None:
    key, equals, value = word.partition("=")
    secret = redact.found(word)
    if secret is not None:
        raise holds_a_secret(key if equals and redact.found(key) is None else "the command line", secret)
    if TARGET in word:
        raise _calls(word, f"{TARGET} lets a setting call any function")
    name = key.lstrip("+~").partition("@")[0]
    if (name in groups or "/" in name) and ".." in value:
        raise _outside(word)


def _yaml_files(folder: Path) -> Iterator[Path]:
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in seen:  # a link back up
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        yield from (Path(place, file) for file in files if file.endswith((".yaml", ".yml")))


def _check_file(path: Path) -> None:
    try:
        root = yaml.compose(path.read_bytes(), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, OSError):
        return  # Hydra cannot read it either, and says so where it is chosen
    except RecursionError as error:
        raise _calls(str(path), "it is nested too deep to be looked at") from error
    for node in _nodes(root):
        if not node.tag.startswith(PLAIN) or "python" in node.tag:
            raise _calls(str(path), f"the tag {node.tag.replace(PLAIN, '!!')} makes an object of any class")
        text = node.value if isinstance(node, yaml.ScalarNode) else ""
        if TARGET in text:
            raise _calls(str(path), f"{TARGET} lets a setting call any function")
        if "oc.decode" in text:
            raise _calls(str(path), "oc.decode builds settings out of text, which cannot be looked through")
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            if str(key.value) in CALLING:
                raise _calls(str(path), f"a logging configuration calls what stands under {key.value!r}")
            leaves = key.value == "defaults" and any(".." in str(n.value) for n in _nodes(value))
            if leaves or "searchpath" in str(key.value):
                raise _outside(str(path))


def _nodes(root: yaml.Node | None) -> Iterator[yaml.Node]:
    """Every node of a document once, whatever its aliases do."""
    waiting, seen = [root] if root is not None else [], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, yaml.MappingNode):
            waiting += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value


def _calls(where: str, why: str) -> ConfigError:
    todo = "take it out; Hydra's own plugins are chosen by name, for example hydra/launcher=basic"
    return ConfigError("Configuration may not run code.", where=where, why=why, todo=todo)


def _outside(where: str) -> ConfigError:
    return ConfigError(
        "Configuration is read from its own folder alone.",
        where=where,
        why="it leaves that folder, so the files it names would not be looked through",
        todo="put the files into one folder and give that: --config-dir FOLDER",
    )
