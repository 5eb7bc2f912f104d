"""What the stages that judge an iterate are given: tasks of lm-eval, and MT-Bench with a judge."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from spin_reg.kept import Kept, Policy
from spin_reg.mt_bench import Judge, Mode, MtBench
from spin_reg.settings import Dtype, Hardware, runtime


@dataclass(frozen=True)
class BenchmarkSpec(Kept):
    """Iterate k judged by one task of lm-eval, in a process of its own.

    `files`: SHA-256 of the task's files. `local`: they are all on this machine, so no network is used.
    """

    kind: ClassVar[str] = "benchmark"
    version: ClassVar[int] = 1
    remade: ClassVar[bool] = True

    k: int
    task: str
    num_fewshot: int | None
    apply_chat_template: bool
    limit: int | None
    files: str | None
    dtype: Dtype
    attn_implementation: str | None
    trust_remote_code: bool = runtime(False)  # the code is part of the model's hash
    base: str | None = runtime(None)  # as in `Policy`
    local: bool = runtime(False)
    include_path: str | None = runtime(None)
    batch_size: int = runtime(8)

    @property
    def words(self) -> str:
        """The task and how it is given, as a folder's name: another way lies in another folder."""
        shots = "" if self.num_fewshot is None else f"-{self.num_fewshot}shot"
        return self.task + shots + "-chat" * self.apply_chat_template + (f"-first{self.limit}" if self.limit else "")


@dataclass(frozen=True)
class QuestionsSpec(Kept):
    """The questions of MT-Bench, or their reference answers, as they were read from `source`.

    `sha256`: their content, whatever file it comes from.
    """

    kind: ClassVar[str] = "questions"
    version: ClassVar[int] = 1
    remade: ClassVar[bool] = True

    references: bool  # a stage of their own: a corrected one changes no answer
    sha256: str | None
    limit: int | None
    source: MtBench = field(metadata={"runtime": True})


@dataclass(frozen=True)
class ConverseSpec(Kept):
    """Iterate k answers each question turn by turn, at the temperature of its category (0: greedily).

    `answers`: how many that will be, for estimates.
    """

    kind: ClassVar[str] = "converse"
    version: ClassVar[int] = 1
    remade: ClassVar[bool] = True

    k: int
    temperatures: Mapping[str, float]
    temperature: float
    max_new_tokens: int
    seed: int
    policy: Policy
    hardware: Hardware
    batch_size: int = runtime(32)
    answers: int = runtime(0)

    def temperature_of(self, category: str) -> float:
        """The temperature at which a question of this category is answered."""
        return self.temperatures.get(category, self.temperature)


@dataclass(frozen=True)
class JudgeSpec(Kept):
    """The answers of iterate k as a judge sees them.

    `prompts`: SHA-256 of what it is told. `cache`: the folder where answered calls are kept.
    """

    kind: ClassVar[str] = "judge"
    version: ClassVar[int] = 1
    remade: ClassVar[bool] = True

    k: int
    mode: Mode
    prompts: str | None
    judge: Judge
    cache: str = runtime("")

    @property
    def words(self) -> str:
        """How and by whom it is judged, as a folder's name: another judge writes into another folder."""
        return f"{self.mode}-{re.sub('[^A-Za-z0-9._]+', '-', str(self.judge.model)).strip('-.') or 'judge'}"
