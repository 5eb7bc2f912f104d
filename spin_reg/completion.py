"""Shell completion: a short script for each shell, all of which ask this module what may stand at the cursor."""

from collections.abc import Sequence
from pathlib import Path

from spin_reg.errors import ConfigError
from spin_reg.grammar import Kind, Verb, Word
from spin_reg.verbs import TABLE

TOP = ("--help", "--version", "--completion")
OUTPUTS = Path("outputs")

BASH = """\
_spin_reg() {
    local line="${COMP_LINE:0:COMP_POINT}" word cut one found
    word="${line##*[[:space:]]}"
    cut="${word%"${word##*[=:]}"}"  # readline begins a new word behind = and :
    mapfile -t found < <(COMP_LINE="$line" "$1" -sc query=bash 2>/dev/null)
    COMPREPLY=()
    for one in "${found[@]}"; do
        [[ $one == "$word"* ]] && COMPREPLY+=("${one#"$cut"}")
    done
    [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *[=/.] ]] && compopt -o nospace
}
complete -F _spin_reg spin-reg
"""
ZSH = """\
_spin_reg() {
    local -a found
    found=(${(f)"$(COMP_LINE="${BUFFER[1,CURSOR]}" $words[1] -sc query=bash 2>/dev/null)"})
    compadd -Q -S '' -- ${(M)found:#*[=/.]}
    compadd -Q -- ${found:#*[=/.]}
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _spin_reg spin-reg
"""
FISH = """\
function __spin_reg_offers
    set -lx COMP_LINE (commandline -cp)
    set -l words (commandline -cpo)
    $words[1] -sc query=fish 2>/dev/null
end
complete -c spin-reg -f -a '(__spin_reg_offers)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def script(words: Sequence[str]) -> str:
    """The script of a shell, to be evaluated when one begins.

    Raises:
        ConfigError: no shell was named, or one that has none.
    """
    if len(words) != 1 or words[0] not in SCRIPTS:
        raise ConfigError(
            "Which shell?",
            where="spin-reg --completion",
            why=f"there are scripts for {', '.join(SCRIPTS)}",
            todo='bash and zsh: eval "$(spin-reg --completion bash)"; fish: spin-reg --completion fish | source',
        )
    return SCRIPTS[words[0]]


def offers(line: str) -> tuple[list[str] | None, str]:
    """What may stand at the end of a command line that is being typed; None where it is a setting, which Hydra knows,
    and then the line as Hydra's own command would have it.
    """
    program, *typed = line.split() or [""]
    current = "" if line.endswith(" ") or not typed else typed.pop()
    if not typed:
        return _beginning([*TABLE, *TOP], current), ""
    name, *rest = typed
    if name not in TABLE:
        return list(SCRIPTS) if name == "--completion" else [], ""
    verb = TABLE[name]
    waiting = _takes(verb, rest[-1]) if rest else None
    if waiting is not None:
        return _values(waiting, current), ""
    if current.startswith("-"):
        return _beginning([*(w.name for w in verb.words if w.is_option), "--help"], current), ""
    given = _given(verb, rest)
    arguments = [word for word in verb.words if not word.is_option]
    found = [value for word in arguments[len(given) :] for value in _values(word, current)]
    if verb.settings and (not found or given):
        return None, " ".join([program, *(w for w in rest if w not in given and not w.startswith("-")), current])
    return found, ""


def _beginning(words: Sequence[str], start: str) -> list[str]:
    return [word for word in words if word.startswith(start)]


def _takes(verb: Verb, before: str) -> Word | None:
    """The option that waits for its value, if the word before the cursor is one."""
    return next((word for word in verb.words if word.name == before and word.is_option and word.value), None)


def _given(verb: Verb, words: Sequence[str]) -> list[str]:
    """The arguments among the words: no option, no value of one, no setting."""
    behind = zip(["", *words], words, strict=False)
    return [w for before, w in behind if not w.startswith("-") and "=" not in w and _takes(verb, before) is None]


def _values(word: Word, start: str) -> list[str]:
    if word.kind is Kind.run:
        return _runs(start)
    if word.kind in (Kind.folder, Kind.file):
        return _paths(start, folders=word.kind is Kind.folder)
    name, equals, choices = word.name.partition("=")
    if equals:  # keep_iterates=needed|last
        return _beginning([f"{name}={choice}" for choice in choices.split("|")], start)
    return _beginning([*word.choices, *word.offers], start)


def _paths(start: str, *, folders: bool) -> list[str]:
    """Paths that begin like this; a folder has a / behind it, so that one can go on into it."""
    above, _, name = start.rpartition("/")
    place = Path(start[: len(start) - len(name)] or ".").expanduser()
    shown = f"{above}/" if "/" in start else ""
    try:
        inside = sorted(place.iterdir())
    except OSError:
        return []
    near = [
        path for path in inside if path.name.startswith(name) and not path.name.startswith("." if not name else "\0")
    ]
    return [f"{shown}{path.name}" + "/" * path.is_dir() for path in near if path.is_dir() or not folders]


def _runs(start: str) -> list[str]:
    """Run folders, those of outputs/ with their whole path, and folders that may hold some."""
    there = [path for path in _paths(start, folders=True)]
    listed = [path.rstrip("/") if (Path(path).expanduser() / "run.json").is_file() else path for path in there]
    usual = [str(path.parent) for path in sorted(OUTPUTS.glob("*/run.json"))]
    return list(dict.fromkeys([*_beginning(usual, start), *listed])) if start else usual or listed
