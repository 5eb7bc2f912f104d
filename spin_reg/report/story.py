"""What one page is about: runs in groups with their inks, and the curves that are drawn of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from spin_reg import metrics
from spin_reg.report import groups, names
from spin_reg.report.charts import Point, Series
from spin_reg.report.gather import Run
from spin_reg.report.groups import Group, Stat, Verdict
from spin_reg.report.ink import Ink, inks
from spin_reg.report.svg import number


@dataclass(frozen=True)
class Story:
    """The runs of a page.

    Attributes:
        repeats: runs that say again what another says; they are no further seed.
        metric: what iterates are judged by.
        unread: runs that could not be read, and why.
    """

    groups: tuple[Group, ...]
    repeats: tuple[Run, ...]
    metric: str
    unread: tuple[str, ...] = ()

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups for run in group.runs.values()]

    @property
    def alone(self) -> Run | None:
        """The run, where the page is about one."""
        return self.runs[0] if len(self.runs) == 1 else None

    @cached_property
    def inks(self) -> list[Ink]:
        return inks([group.regularizer for group in self.groups])

    @property
    def drawn(self) -> list[tuple[Group, Ink]]:
        return list(zip(self.groups, self.inks, strict=True))

    @property
    def seeded(self) -> bool:
        """Whether spread is over seeds; else it is over the held-out prompts of one run."""
        return any(len(group.runs) > 1 for group in self.groups)

    @property
    def spread(self) -> str:
        """What is drawn and written behind a mean."""
        if self.seeded:
            return "areas and ± are one standard deviation over the seeds"
        return "bars and ± are one standard error over the held-out prompts"

    @cached_property
    def judged(self) -> list[dict[int, Verdict]]:
        """For each group, how its runs went by the metric, by seed."""
        return [groups.verdicts(group, self.metric) for group in self.groups]

    @cached_property
    def measured(self) -> list[str]:
        """All metrics of the iterates, in the order in which they were measured."""
        values = [values for run in self.runs for values in run.iterates.values()]
        return list(dict.fromkeys(key for found in values for key in found if not key.endswith("_se")))

    def series(self, metric: str) -> list[Series]:
        """The curve of each group that has this metric."""
        made = []
        for group, ink in self.drawn:
            points = tuple(self._point(group, metric, k, found) for k, found in groups.curve(group, metric).items())
            if points:
                made.append(Series(group.label, ink, points, ring=groups.best_of(group, metric)))
        return made

    def _point(self, group: Group, metric: str, k: int, found: Stat) -> Point:
        spread = self.beside(group, metric, k, found)
        low, high = (None, None) if spread is None else (found.mean - spread, found.mean + spread)
        return Point(k, found.mean, low, high, said(found, spread, seeds=self.seeded))

    def beside(self, group: Group, metric: str, k: int, found: Stat) -> float | None:
        """The spread of a mean: see `spread`; None where there is none to tell."""
        if self.seeded:
            return found.sd
        (run,) = group.runs.values()
        return run.iterates[k].get(f"{metric}_se")

    def level(self, metric: str) -> tuple[float, str] | None:
        """A value to compare with: for the logistic loss what a coin flip costs."""
        if metric == "train/loss":
            logistic = all(group.settings.get("loss.name") == "logistic" for group in self.groups)
            return (0.6931471805599453, "log 2") if logistic else None
        return names.name(metric).rule

    def about(self, metric: str) -> str:
        """The curves of a metric in words."""
        told = []
        for one in self.series(metric):
            first, last = one.points[0], one.points[-1]
            best = "" if one.ring is None else f", best at iterate {one.ring:g}"
            told.append(f"{one.label}: {number(first.y)} at iterate {first.x:g}, {number(last.y)} at {last.x:g}{best}")
        return f"{names.words(metric)} by iterate. " + "; ".join(told) + "."


def said(found: Stat, spread: float | None, *, seeds: bool) -> str:
    """A mean with its spread, as one reads it at a point."""
    return (
        number(found.mean) + ("" if spread is None else f" ± {number(spread)}") + (f"  n = {found.n}" if seeds else "")
    )


def told(runs: Sequence[Run], metric: str | None, unread: Sequence[str]) -> Story:
    """The story of these runs, judged by this metric, or by what suits the data."""
    found, repeats = groups.group(runs)
    judge = metric or groups.main_metric(runs)
    assert judge in metrics.HEALTHY
    return Story(tuple(found), tuple(repeats), judge, tuple(unread))
