"""The settings of evaluation: which tasks of lm-eval every iterate is judged by and how, and MT-Bench."""

import re
from dataclasses import dataclass, field

from spin_reg import settings
from spin_reg.exact import ExactMatch
from spin_reg.mt_bench import Judge, MtBench, check_together
from spin_reg.settings import MISSING, check, positive, runtime

NAME = re.compile(r"\w[\w.+()-]*")  # a task's name is a word of lm-eval's command, and names a folder


@dataclass
class Benchmark:
    """A task, group or tag of lm-eval; `num_fewshot` worked examples precede a question (null: as the task says)."""

    task: str = MISSING
    num_fewshot: int | None = None

    def __post_init__(self) -> None:
        ok = NAME.fullmatch(self.task) is not None
        check(ok, f"evaluation.benchmarks: {self.task!r} is no name of a task (and tasks are given by name alone)")
        ok = self.num_fewshot is None or self.num_fewshot >= 0
        check(ok, f"evaluation.benchmarks: {self.task} has num_fewshot={self.num_fewshot}: give 0 or more, or null")


@dataclass(frozen=True)
class TaskFiles:
    """What a task is by content: one SHA-256 over its files, None where they are not to be had.

    `local`: it reads files of this machine alone, so that its run may be kept off the network.
    """

    sha256: str | None = None
    local: bool = False


@dataclass
class Evaluation(settings.Evaluation):
    """Whether iterates are judged, how many held-out samples are shown, benchmarks through lm-eval (extra `eval`), and
    MT-Bench with a judge (extra `judge`).

    `exact_match`: whether held-out answers come to the real result. `full_kl`: the KL to the base and to the previous
    iterate over the whole vocabulary, on the first `full_kl_prompts` held-out prompts; two models are in memory then.

    `include_path`: a folder with task YAMLs of one's own (and Python that they name, which is run).
    `limit`: only the first so many items of every task, for trying out.
    """

    exact_match: ExactMatch = field(default_factory=ExactMatch)
    full_kl: bool = False
    full_kl_prompts: int = 64
    benchmarks: list[Benchmark] = field(default_factory=list)
    include_path: str | None = runtime(None)  # what its tasks hold counts, by content
    apply_chat_template: bool = False
    limit: int | None = None
    benchmark_batch_size: int = runtime(8)
    mt_bench: MtBench = field(default_factory=MtBench)
    judge: Judge = field(default_factory=Judge)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(evaluation__limit=self.limit, evaluation__benchmark_batch_size=self.benchmark_batch_size)
        names = [benchmark.task for benchmark in self.benchmarks]
        twice = sorted({name for name in names if names.count(name) > 1})
        check(not twice, f"evaluation.benchmarks: {', '.join(twice)}: give each task once")
        matched = self.exact_match.regex is not None
        asked = {"benchmarks": bool(self.benchmarks), "exact_match": matched, "full_kl": self.full_kl}
        for key, given in asked.items():
            message = f"evaluation.enabled=false: it leaves evaluation.{key} without effect; leave one of them out"
            check(self.enabled or not given, message)
        positive(evaluation__full_kl_prompts=self.full_kl_prompts)
        ok = self.full_kl or self.full_kl_prompts == 64
        message = f"evaluation.full_kl_prompts={self.full_kl_prompts}: without evaluation.full_kl=true it does nothing"
        check(ok, f"{message}; set that too")
        off = {"include_path": None, "apply_chat_template": False, "limit": None, "benchmark_batch_size": 8}
        for key, value in off.items():
            now = getattr(self, key)
            ok = bool(self.benchmarks) or now == value
            check(ok, f"evaluation.{key}={now}: without benchmarks it does nothing; set evaluation.benchmarks")
        check_together(self.enabled, self.mt_bench, self.judge)
