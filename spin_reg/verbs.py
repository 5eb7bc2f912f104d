"""The verbs of the command as a table: what each does and takes. Help, completion and parsing read it.

A new verb is an entry of TABLE and a function in `cli.VERBS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any


class Kind(StrEnum):
    """What a word stands for, and so what a shell may offer in its place."""

    run = "run"
    folder = "folder"
    file = "file"
    text = "text"


@dataclass(frozen=True)
class Word:
    """An argument (RUN) or an option (--to) of a verb.

    `value`: what an option is given, as help shows it; none: a flag. `choices`: all that is taken; `offers`: what a
    shell proposes beside them. `needed`: an option that must be given; arguments must, unless they are `optional`.
    """

    name: str
    what: str
    value: str = ""
    kind: Kind = Kind.text
    read: Callable[[str], Any] = str
    choices: tuple[str, ...] = ()
    offers: tuple[str, ...] = ()
    needed: bool = False
    optional: bool = False
    many: bool = False

    @property
    def is_option(self) -> bool:
        return self.name.startswith("-")

    def shown(self) -> str:
        return f"{self.name} {self.value}" if self.value else self.name


EXITS = {
    0: "done",
    1: "a failure of spin-reg, or a damaged file",
    2: "the command line or a setting is wrong",
    3: "the data cannot be used",
    4: "another process is at work in the run folder",
    5: "numbers that are not finite",
    6: "the disk has no room",
    75: "stopped by a signal; the same command goes on",
}


@dataclass(frozen=True)
class Verb:
    """`what` is one line; `text` says more. `settings`: it takes key=value, and Hydra completes them; `composed`:
    its --help lists groups and settings too. `examples`: pairs of a command and what it does. `exits`: its exit codes.
    """

    what: str
    text: str = ""
    words: tuple[Word, ...] = ()
    settings: bool = False
    composed: bool = False
    examples: tuple[tuple[str, str], ...] = ()
    exits: tuple[int, ...] = (0, 1, 2)


RUN = Word("RUN", "the folder of a run, as outputs/NAME", kind=Kind.run)
SWEEP = Word("-m", "a sweep: a run for every combination of the values given with commas")
JOB = Word("--cfg", "print the composed settings and run nothing", "job", choices=("job", "hydra", "all"))
RUNNING = (0, 1, 2, 3, 4, 5, 6, 75)

TABLE: dict[str, Verb] = {
    "train": Verb(
        "generate, score, train and evaluate, iteration after iteration",
        "Settings name the run's folder, so the same command again goes on where it stopped, and does nothing where "
        "all is done. Ctrl-C keeps every finished step. The folder is printed at the end.",
        (SWEEP, JOB),
        settings=True,
        composed=True,
        examples=(
            ("spin-reg train regularizer=kl alpha=0.5", "three iterations on the embedded toy, no network"),
            ("spin-reg train -m alpha=0,0.25,0.5,1", "a sweep; what the points share is made once"),
            (
                "spin-reg train model=pretrained model.name_or_path=FOLDER dataset=jsonl dataset.path=FILE",
                "your own model and data",
            ),
            ("spin-reg train experiment=spin", "a preset of the field"),
        ),
        exits=RUNNING,
    ),
    "plan": Verb(
        "print what train would do, what is done, and what it may cost; runs nothing",
        "A line a stage, done, reuse, todo or stale, and why; then tokens, memory, time and disk.",
        (SWEEP, JOB),
        settings=True,
        composed=True,
        examples=(
            ("spin-reg plan regularizer=kl alpha=0.5", "before a run, or between two of its calls"),
            ("spin-reg plan experiment=small_lora", "what a preset would need"),
        ),
        exits=(0, 1, 2, 3),
    ),
    "resume": Verb(
        "go on with a run, with the settings it was made with",
        "Settings that change its results are refused; others, as schedule.iterations, may be given.",
        (RUN,),
        settings=True,
        examples=(
            ("spin-reg resume outputs/RUN", "what is missing"),
            ("spin-reg resume outputs/RUN schedule.iterations=5", "up to iterate 5"),
        ),
        exits=RUNNING,
    ),
    "evaluate": Verb(
        "judge the iterates of a run that were not yet, and print all that was measured",
        "Without RUN it takes the settings that name it, as train does.",
        (Word("RUN", RUN.what, kind=Kind.run, optional=True),),
        settings=True,
        composed=True,
        examples=(
            ("spin-reg evaluate outputs/RUN", "every metric by iterate, and the cross-play matrix"),
            ("spin-reg evaluate outputs/RUN evaluation=openllm", "benchmarks of lm-eval, only what is missing"),
        ),
        exits=RUNNING,
    ),
    "export": Verb(
        "an iterate as an ordinary Hugging Face folder, an adapter merged into its base",
        words=(
            RUN,
            Word("--to", "a folder that is not there yet", "FOLDER", kind=Kind.folder, read=Path, needed=True),
            Word("--iterate", "which one; 0 is the base (default: the last that is finished)", "K", read=int),
        ),
        examples=(("spin-reg export outputs/RUN --to my-model", "the last iterate"),),
        exits=(0, 1, 2, 6),
    ),
    "sync": Verb(
        "send the metrics of a run to its tracker, or to another",
        "No model is loaded. The same id is used, so what is there is not doubled. Only tracker settings are taken.",
        (RUN,),
        settings=True,
        examples=(
            ("spin-reg sync outputs/RUN", "after a run without a network"),
            ("spin-reg sync outputs/RUN tracker=tensorboard", "to another tracker"),
        ),
        exits=(0, 1, 2, 4),
    ),
    "status": Verb(
        "the runs of a folder and how far they are",
        words=(Word("DIR", "a folder of runs, or a run (default: outputs)", kind=Kind.folder, optional=True),),
        examples=(("spin-reg status", "the runs in outputs"),),
    ),
    "gc": Verb(
        "what nothing needs any more, by name and size",
        "Shows it; removes it with --yes.",
        (
            Word("DIR", "a folder of runs, or a run (default: outputs)", kind=Kind.folder, optional=True),
            Word("keep_iterates=needed|last", "whose weights are to stay (default: as the run was made)"),
            Word("--yes", "remove what is shown"),
        ),
        examples=(
            ("spin-reg gc", "what could go from outputs"),
            ("spin-reg gc outputs/RUN keep_iterates=last --yes", "keep the last iterate's weights alone"),
        ),
        exits=(0, 1, 2),
    ),
}
