"""What a page says in sentences: its title, what came out, and how to read its figures."""

from statistics import fmean

from spin_reg import metrics
from spin_reg.report import groups, names
from spin_reg.report.groups import Stat
from spin_reg.report.story import Story
from spin_reg.report.svg import number, visible

AXES = (
    "Vertical axes show the range of the values and need not begin at zero.",
    "The best of several iterates is picked on the held-out prompts it is judged by, so it looks a little better than "
    "it is.",
)
STRENGTH = (
    "What more of the base in the reference brings, where runs differ in alpha alone: hollow marks are each run’s best "
    "iterate, filled ones its last; alpha 0 is SPIN. Means over the seeds that all strengths have in common."
)
STABILITY = "Small marks are runs, large ones their means. "
CORNER = "Calm and good is the lower left corner."
QUALITY = "How far iterates are from the data they should learn, and what they forget. A ring marks the best."
DRIFT = (
    "How far the policy walks from where it began, and what becomes of its answers: their length, how often they run "
    "into the limit, and whether they still vary."
)
GAME = (
    "Each iterate against the opponent it was trained against. Over iterations an accuracy toward one half says that "
    "nothing is left to tell apart."
)
CROSSPLAY = (
    "Discriminator fᵢ is what the iteration that made iterate i learned; each cell says how often it tells a real "
    "answer from one of iterate j. Blue is more often than by chance, orange less often. Right of the line answers are "
    "as new as the discriminator or newer: an old one that wins there again says that the policy forgets, or goes in "
    "circles."
)
TRAINING = "On the training pairs, before each step; every iteration is drawn as wide as any."
OTHERS = "What was measured beyond that."
SAMPLES = (
    "The first held-out prompts: the real answer, and what each iterate answered, one draw each, at temperature 1."
)


def stability(metric: str) -> str:
    """How to read the chart of stability; it names a corner where low is good."""
    return STABILITY + (CORNER if metrics.HEALTHY[metric] is metrics.Healthy.low else "")


def training(longest: int, *, seeded: bool) -> str:
    """How training curves are made."""
    averaged = (
        f"Each point is the mean of up to {longest} steps." if longest > 1 else "Every step is drawn, unsmoothed."
    )
    return f"{TRAINING} {averaged}" + (" Means over seeds." if seeded else "")


def title(story: Story) -> str:
    """Model, data and what is compared."""
    kinds = list(dict.fromkeys(group.regularizer for group in story.groups))
    played = (
        story.groups[0].label
        if len(story.groups) == 1
        else ", ".join(kinds[:-1]) + " and " * (len(kinds) > 1) + kinds[-1]
    )
    return visible(f"{_model(story)} on {_data(story)}: {played}")


def over(story: Story) -> str:
    """What stands over the title."""
    run = story.alone
    return visible(run.root.name) if run is not None else f"{len(story.runs)} runs of spin-reg"


def _of(story: Story, *keys: str) -> str:
    """The values of the first of these settings that is there, without the folders before them."""
    found = [next((g.settings[key] for key in keys if g.settings.get(key)), "") for g in story.groups]
    return ", ".join(dict.fromkeys(visible(str(one).rstrip("/").rpartition("/")[2]) for one in found))


def _model(story: Story) -> str:
    return _of(story, "model.name_or_path", "model._choice")


def _data(story: Story) -> str:
    return _of(story, "dataset.path", "dataset._choice")


def facts(story: Story) -> list[tuple[str, str]]:
    """Name and value of what a reader asks first."""

    def counted(split: str) -> str:
        found = sorted({run.counts[split] for run in story.runs if split in run.counts})
        return " – ".join(f"{one:,}".replace(",", " ") for one in dict.fromkeys((found[0], found[-1]))) if found else ""

    seeds = {run.seed for run in story.runs}
    last = max((k for run in story.runs for k in run.iterates), default=0)
    rows = [
        ("model", _model(story)),
        ("data", _data(story)),
        ("training prompts", counted("train")),
        ("held-out prompts", counted("heldout")),
        ("iterates", f"{last} and the base" if last else "the base"),
        ("seeds" if len(seeds) > 1 else "seed", str(len(seeds)) if len(seeds) > 1 else str(*seeds)),
    ]
    return [(key, words) for key, words in rows if words]


def lead(story: Story) -> list[str]:
    """What came out, in sentences made of the numbers alone."""
    metric, name = story.metric, names.name(story.metric).title
    run = story.alone
    if run is not None:
        verdict = groups.verdict(run, metric)
        begin = [] if run.state.startswith("finished") else [f"{run.state[0].upper()}{run.state[1:]}."]
        if verdict is None:
            return [*begin, "Fewer than two iterates have been evaluated, so there is nothing to compare yet."]
        base, best, last = (number(one) for one in (verdict.base, verdict.best, verdict.last))
        if verdict.best_at == 0:
            words = (
                f"By {name} no iterate is better than the base ({base}); the last one, {verdict.last_at}, has {last}."
            )
        elif verdict.best_at == verdict.last_at:
            words = f"{name} went from {base} at the base to {best} at the last iterate, {verdict.last_at}, the best."
        else:
            words = (
                f"{name} went from {base} at the base to {best} at iterate {verdict.best_at}, the best, and stands at "
                f"{last} at the last, {verdict.last_at}."
            )
        return [*begin, words, *([f"Stopped {run.stopped}."] if run.stopped else [])]
    bests = [
        (group, groups.over(made, lambda v: v.best)) for group, made in zip(story.groups, story.judged, strict=True)
    ]
    known = [(group, best) for group, best in bests if best is not None]
    if not known:
        return ["Fewer than two iterates have been evaluated, so there is nothing to compare yet."]
    good = sorted(known, key=lambda one: metrics.badness(metric, one[1].mean))
    uneven = len({found.n for _, found in known}) > 1
    few = "; ".join(f"{group.label}: {_mean(found, uneven)}".replace(" ", "\xa0") for group, found in good[:4])
    more = f" and {len(good) - 4} more" if len(good) > 4 else ""
    return [f"{name} at the best iterate of each run: {few}{more}. {_bases(story)}."]


def _bases(story: Story) -> str:
    """What the runs began with: one number only where groups share their bases, seed by seed."""
    by_seed: dict[int, set[float]] = {}
    for seed, verdict in (each for made in story.judged for each in made.items()):
        by_seed.setdefault(seed, set()).add(verdict.base)
    if all(len(found) == 1 for found in by_seed.values()):
        return f"The base has {number(fmean(value for found in by_seed.values() for value in found))}"
    means = [fmean(verdict.base for verdict in made.values()) for made in story.judged if made]
    return f"Their bases have {number(min(means))} to {number(max(means))}"


def _mean(found: Stat, uneven: bool) -> str:
    """A mean with its spread, and over how many seeds where groups differ in that."""
    spread = "" if found.sd is None else f" ± {number(found.sd)}"
    return number(found.mean) + spread + (f" (n = {found.n})" if uneven else "")
