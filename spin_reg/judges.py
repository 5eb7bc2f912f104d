"""The stages of MT-Bench in a plan, and what they will ask of the judge before they do."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from spin_reg import asking, judging, policies, rundir
from spin_reg.config import Config
from spin_reg.judging import Answers
from spin_reg.judging import Cost as Cost
from spin_reg.mt_bench import Asked, Mode, Question
from spin_reg.replies import Cache
from spin_reg.specs import ConverseSpec, JudgeSpec, QuestionsSpec, Spec
from spin_reg.stage import Stage

CACHE = ".judge"  # below `outputs`: answered calls, of all runs
ROLES = ("answers", "opponent")
Add = Callable[[str, Spec, Mapping[str, Stage]], Stage]


def plan(config: Config, found: Asked | None, k: int, add: Add, model: Callable[[int], Stage]) -> None:
    """Add what iterate k is to answer, and what is to be judged of it.

    Args:
        add: adds a stage, or returns the one of that name. model: the stage that makes an iterate.
    """
    asked, judge = config.evaluation.mt_bench, config.evaluation.judge
    if asked.questions is None:
        return
    shown = [None, None] if found is None else [found.turns_sha256, found.references_sha256]
    questions = add("mt_bench/questions", QuestionsSpec(False, shown[0], asked.limit, asked), {})
    references = add("mt_bench/references", QuestionsSpec(True, shown[1], asked.limit, asked), {})

    def answers(j: int) -> Stage:
        spec = ConverseSpec(
            k=j,
            temperatures=asked.by_category,
            temperature=asked.temperature,
            max_new_tokens=asked.max_new_tokens,
            seed=config.seed,
            policy=policies.policy(config),
            hardware=config.hardware,
            batch_size=config.generation.batch_size,
            answers=0 if found is None else sum(len(q.turns) for q in found.questions[: asked.limit]),
        )
        return add(f"iterate-{j:02d}/mt_bench/answers", spec, {"questions": questions, "model": model(j)})

    own = {"questions": questions, "references": references, "answers": answers(k)}
    for mode in (mode for mode in Mode if mode in judge.modes):
        told = None if found is None else found.prompts_sha256(mode)
        spec = JudgeSpec(k, mode, told, judge, f"{config.outputs}/{CACHE}")
        if mode is Mode.single:
            add(f"iterate-{k:02d}/mt_bench/{spec.words}", spec, own)
        elif k > 0:
            add(f"iterate-{k:02d}/mt_bench/{spec.words}", spec, own | {"opponent": answers(0)})


def expected(todo: Sequence[Stage], found: Asked | None, root: Path) -> Cost:
    """What the stages still to be made will ask of the judge at most.

    Answers that are not there yet are taken to be as long as they may be, and not in the cache.
    """
    total = Cost()
    names = {stage.name for stage in todo}
    for stage in todo:
        spec = stage.spec
        if not isinstance(spec, JudgeSpec) or found is None:
            continue
        limit = getattr(stage.needs["questions"].spec, "limit", None)
        asked = found.questions[:limit]
        shown = {role: _answers(stage.needs[role], names, asked, root) for role in stage.needs if role in ROLES}
        calls = judging.calls(spec.judge, found.prompts[spec.mode], asked, shown["answers"], shown.get("opponent"))
        cache = Cache(Path(spec.cache).expanduser())
        total = total.plus(judging.cost(spec.judge, calls, cache.has))
    return total


def _answers(stage: Stage, todo: set[str], asked: Sequence[Question], root: Path) -> Answers:
    """An iterate's answers; where they are still to be made, texts of their greatest length."""
    if stage.name not in todo and rundir.readable(root / stage.folder) is not None:
        from spin_reg.stages.judge import answers_of

        return answers_of(root / stage.folder)
    assert isinstance(stage.spec, ConverseSpec)
    longest = "x" * (judging.CHARACTERS * stage.spec.max_new_tokens)
    return {q.question_id: [f"{stage.spec.k} {turn} {longest}" for turn in range(len(q.turns))] for q in asked}


def check(config: Config, todo: Sequence[Stage], found: Asked | None, root: Path) -> None:
    """Before anything starts: the judge can be asked, and will not cost more than is allowed.

    Raises:
        ConfigError: the client or the key is missing; or a limit is too low.
    """
    if any(isinstance(stage.spec, JudgeSpec) for stage in todo):
        needed = expected(todo, found, root)
        asking.begin()
        if needed.calls:
            asking.check(config.evaluation.judge)
        asking.check_limits(config.evaluation.judge, needed)
