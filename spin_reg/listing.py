"""`spin-reg ls`: the runs of a folder by what sets them apart."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spin_reg import groups, manual, sheet, survey
from spin_reg.errors import ConfigError, DamagedError
from spin_reg.groups import Run
from spin_reg.status import existing

COLUMNS = ("run", "settings", "iterates", "heldout_nll", "best", "problem")
NLL = "eval/heldout_nll"


def main(words: Sequence[str]) -> int:
    """The verb.

    Raises:
        ConfigError: the folder does not exist, a word that it does not take, or a setting that no run has.
    """
    given = manual.parsed("ls", words)
    wanted: dict[str, str] = given.settings
    folder = existing(Path(given.dir or "outputs"))
    found, problems = read(survey.roots(folder))
    keys = {shown(key) for run in found for key in run.settings}
    for key in sorted(wanted.keys() - keys) if found else ():
        why, todo = "it is no setting that changes results", f"known of these runs: {', '.join(sorted(keys))}"
        raise ConfigError(f"No run here has a setting {key}.", where=f"spin-reg ls {key}=...", why=why, todo=todo)
    found = [run for run in found if all(means(named(run.settings).get(k), v) for k, v in wanted.items())]
    if given.json:
        runs = [_json(run.root, run, None) for run in found] + [_json(root, None, why) for root, why in problems]
        sheet.show_json({"folder": str(folder.resolve()), "runs": runs})
        return 0
    if not found and not problems:
        print(f"no such runs in {folder}" if wanted else f"no runs in {folder}")
        return 0
    apart = groups.differing([named(run.settings) for run in found])
    rows = [_row(run, {key: values[i] for key, values in apart.items()}) for i, run in enumerate(found)]
    rows += [[root.name, "", "", "", "", why] for root, why in problems]
    sheet.show(str(folder), COLUMNS, rows, right=("iterates", "heldout_nll", "best"))
    return 0


def read(roots: Sequence[Path]) -> tuple[list[Run], list[tuple[Path, str]]]:
    """The runs in these folders, and those that cannot be read, with why."""
    found, problems = list[Run](), list[tuple[Path, str]]()
    for root in roots:
        try:
            run = groups.read(root)
        except DamagedError as error:
            problems.append((root, f"{error.where}: {error.why}"))
            continue
        except (ValueError, KeyError, TypeError, OSError) as error:
            problems.append((root, f"{type(error).__name__}: {error}"))
            continue
        found += [run] if run is not None else []
    return found, problems


def shown(key: str) -> str:
    """A setting's name as one types it: a group's option stands under the group, and alpha alone."""
    return "alpha" if key == "regularizer.alpha" else key.removesuffix("._choice")


def named(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under the names that one types."""
    return {shown(key): value for key, value in settings.items()}


def said(value: Any) -> str:
    """A value as one types it; a list of one value an iteration is that value."""
    if isinstance(value, list) and len(value) == 1:
        return said(value[0])
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else json.dumps(value)


def means(value: Any, text: str) -> bool:
    """Whether what was typed is this value: 1e-2 is 0.01."""
    try:
        return said(value) in (text, said(float(text)))
    except ValueError:
        return said(value) == text


def _row(run: Run, apart: Mapping[str, Any]) -> list[str]:
    nll = {k: values[NLL] for k, values in run.metrics.items() if NLL in values}
    best = min(nll, key=lambda k: nll[k]) if nll else None
    return [
        run.root.name,
        " ".join(f"{key}={said(value)}" for key, value in apart.items() if value is not None),
        str(len(run.metrics)),
        f"{nll[max(nll)]:.3f}" if nll else "",
        "" if best is None else f"{nll[best]:.3f} ({best})",
        "",
    ]


def _json(root: Path, run: Run | None, problem: str | None) -> dict[str, Any]:
    settings, values = (None, None) if run is None else (dict(run.settings), dict(run.metrics))
    return {
        "run": root.name,
        "path": str(root.resolve()),
        "settings": settings,
        "metrics": values,
        "problem": problem,
    }
