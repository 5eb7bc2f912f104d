"""The command: verbs, Hydra behind `train` and `plan`, and errors as four lines. Nothing here imports torch."""

import os
import shlex
import sys
import traceback
from collections.abc import Callable
from functools import partial
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from spin_reg import __version__, launched, manual, sheet, stopping, verbs
from spin_reg.errors import ConfigError, SpinRegError
from spin_reg.redact import redacted


def conf_dir() -> Path:
    """conf/: beside the modules in an installed package, else at the checkout's root."""
    here = Path(__file__).resolve().parent
    return here / "conf" if (here / "conf").is_dir() else here.parent / "conf"


def main() -> None:
    """The console script."""
    program, *words = sys.argv
    sheet.typed_in(None)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # not every terminal can show what a model may say
    try:
        code = launched.main(partial(_dispatch, program, words))
    except SpinRegError as error:
        code = report(error)
    except KeyboardInterrupt:  # before a run listens for signals there is nothing to save
        code = report(stopping.stopped())
    except BrokenPipeError:
        sys.stderr.close()
        code = 1
    except Exception as error:
        code = report(ours(error, full="HYDRA_FULL_ERROR" in os.environ))
    from spin_reg import tracking

    tracking.leave(code)


def report(error: SpinRegError) -> int:
    """Print an error; returns its exit code."""
    print(redacted(f"spin-reg: {error}"), file=sys.stderr)
    return error.exit_code


def _dispatch(program: str, words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        asked = [word for word in words[1:] if word in verbs.TABLE]
        print(manual.page(asked[0]) if asked else manual.overview(), end="")
        return 0
    verb, *rest = words
    if verb in verbs.TABLE and not verbs.TABLE[verb].composed and {"-h", "--help"} & set(rest):
        print(manual.page(verb), end="")
        return 0
    if verb == "--version":
        print(__version__)
        return 0
    if verb in ("-sc", "--shell-completion"):
        return _complete(program, words)
    if verb == "--completion":
        from spin_reg import completion

        print(completion.script(rest), end="")
        return 0
    if verb not in VERBS:
        from difflib import get_close_matches

        near = get_close_matches(verb, VERBS, n=1)
        todo = f"did you mean `spin-reg {near[0]}`?" if near else f"verbs: {', '.join(VERBS)}"
        raise ConfigError(f"There is no verb {verb}.", where="the command line", why="it is none of ours", todo=todo)
    return VERBS[verb](program, rest)


def _complete(program: str, words: list[str]) -> int:
    """What a shell asks at the cursor: ours for verbs, options, folders; for settings Hydra's, which sees no verb."""
    from spin_reg import completion

    line = os.environ.get("COMP_LINE", "")
    if line:
        found, os.environ["COMP_LINE"] = completion.offers(line)
        if found is not None:
            print("\n".join(found))
            return 0
    return _compose(program, words, lambda cfg: None)


def _train(program: str, words: list[str]) -> int:
    from spin_reg.sweeps import group

    return _compose(program, words, partial(_run, typed=[program, "train", *words], group=group(words)))


def _plan(program: str, words: list[str]) -> int:
    from spin_reg import preview

    own, seen = {"--json", "--prepare"} & set(words), list[Any]()
    task = partial(_show_plan, typed=[program, "plan", *words], own=own, seen=seen)
    code = _compose(program, [word for word in words if word not in own], task, verb="plan")
    if len(seen) > 1 and "--json" not in own:
        preview.total(seen)
    return code


def _resume(program: str, words: list[str]) -> int:
    from spin_reg.runs import words_of

    return _compose(program, words_of("resume", words), partial(_run, typed=[program, "resume", *words], again=True))


def _evaluate(program: str, words: list[str]) -> int:
    from spin_reg.runs import names_a_folder, words_of

    task = partial(_run, typed=[program, "evaluate", *words], only_evaluate=True)
    if not names_a_folder(words):
        return _compose(program, words, task, verb="evaluate")
    switched_off = [word for word in words_of("evaluate", words) if word != "evaluation=none" or word in words]
    return _compose(program, switched_off, partial(task, again=True), verb="evaluate")


def _sync(program: str, words: list[str]) -> int:
    from spin_reg.runs import words_of

    given = words[1:]
    merged = words_of("sync", words)
    for word in given:
        if not word.startswith(("tracker=", "tracker.")):
            why = "it only sends what the run has logged"
            raise ConfigError("sync takes the tracker's settings alone.", where=word, why=why, todo="leave it out")
    if any(word.startswith("tracker=") for word in given):  # it may not know what the run's own one was given
        merged = [word for word in merged if word in given or not word.startswith("tracker.")]
    return _compose(program, merged, _replay)


def _replay(cfg: Any) -> None:
    from spin_reg import config, rundir, runner, tracking
    from spin_reg.fingerprint import flatten, plain

    settings = config.load(cfg, sweep=True)  # as lenient as any command that made it
    root = Path(settings.outputs) / config.run_name(settings)
    with rundir.owned(root):
        print(tracking.replay(root / runner.METRICS, settings.tracker, flatten(plain(settings))))


def _export(program: str, words: list[str]) -> int:
    from spin_reg import export
    from spin_reg.runs import words_of

    given = manual.parsed("export", words)
    given.to = given.to.expanduser().resolve()  # before the process moves to where the run began
    given.format = given.format or export.MODEL
    export.check(given)
    return _compose(program, words_of("export", [given.run]), partial(export.task, given=given))


def _sample(program: str, words: list[str]) -> int:
    from spin_reg import sample
    from spin_reg.runs import words_of

    given = manual.parsed("sample", words)
    sample.check(given)
    asked = sample.prompts(given)  # before the process moves to where the run began
    return _compose(program, words_of("sample", [given.run]), partial(sample.task, given=given, asked=asked))


def _reader(module: str, program: str, words: list[str]) -> int:
    """The verbs that read files alone are a module each, imported where it is wanted."""
    return int(import_module(f"spin_reg.{module}").main(words))


def _gc(program: str, words: list[str]) -> int:
    from spin_reg import runs

    return runs.gc(words, conf_dir())


def _page(program: str, words: list[str]) -> int:
    from spin_reg.report import verb

    return next(iter([report(error) for error in verb.main(words)]), 0)


def page_after(roots: list[Path]) -> None:
    """The page about what is finished; why there is none is told, and is no failure of the run."""
    from spin_reg.report import verb

    for error in verb.after(roots):
        report(error)


VERBS: dict[str, Callable[[str, list[str]], int]] = {
    "train": _train,
    "plan": _plan,
    "resume": _resume,
    "evaluate": _evaluate,
    "export": _export,
    "sample": _sample,
    "sync": _sync,
    "status": partial(_reader, "status"),
    "ls": partial(_reader, "listing"),
    "compare": partial(_reader, "compare"),
    "report": _page,
    "gc": _gc,
}


def _compose(program: str, words: list[str], task: Callable[[Any], Any], verb: str = "train") -> int:
    """Hand the words to Hydra; its errors come back as ours. `verb`: whose page --help begins with."""
    import hydra

    from spin_reg import config, overrides, single, sweeps

    config.register()
    page = overrides.register_help(conf_dir(), verb)
    words = overrides.check(words)
    sys.argv = [program, *words]
    full = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, instead of printing and exiting
    compose = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
    failures: list[Exception] = []

    def alone(cfg: Any) -> None:
        try:
            task(cfg)
        except Exception as error:  # Hydra would print what it catches
            failures.append(error)

    try:
        if sweeps.MULTIRUN & set(words):
            return sweeps.run(compose, words, task, full=bool(full))
        settings = [word for word in words if word not in single.HELP]
        if not single.plain(settings) or single.sweeping(conf_dir()):
            compose(alone)()
        elif len(settings) < len(words):
            single.show_help(conf_dir(), settings, page)
        else:
            single.run(conf_dir(), words, alone)
    except BrokenPipeError:
        raise
    except Exception as error:
        failures.append(error)
    finally:
        if full is None:
            del os.environ["HYDRA_FULL_ERROR"]
    if failures and isinstance(failures[0], BrokenPipeError):
        raise failures[0]
    return report(ours(failures[0], full=bool(full))) if failures else 0


def ours(error: Exception, *, full: bool) -> SpinRegError:
    """An error as one of ours; `full`: its traceback is printed."""
    from spin_reg import overrides

    if full:
        print(redacted("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    return error if isinstance(error, SpinRegError) else overrides.explain(error)


def _planned(cfg: Any, *, only_evaluate: bool = False, again: bool = False, group: str | None = None) -> Any:
    """The plan of a run; `again`: of one that is there, so as lenient as any command that made it."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from spin_reg import config, launch, sweeps

    hydra = HydraConfig.get()
    lenient = again or hydra.mode == RunMode.MULTIRUN
    settings = sweeps.grouped(config.load(cfg, sweep=lenient, given=hydra.overrides.task), group)
    return launch.prepare(settings, only_evaluate=only_evaluate)


def _run(cfg: Any, *, typed: list[str], **how: Any) -> Any:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from spin_reg import launch, points, results
    from spin_reg.console import closing_words
    from spin_reg.report.sheets import PAGE
    from spin_reg.sheet import short

    hydra, screen = HydraConfig.get(), _screen()
    with stopping.listening(), screen.warnings():
        planned = _planned(cfg, **how)
        stopping.goes_on_by(f"spin-reg resume {shlex.quote(short(planned.root))}", once=planned.root / "run.json")
        if planned.stages and not planned.finished:
            try:
                planned = launch.execute(planned, listener=screen, command=typed, overrides=list(hydra.overrides.task))
            finally:
                screen.close()
        value = results.objective(planned.root, planned.config.objective)
        several = hydra.mode == RunMode.MULTIRUN
        closing_words(planned, screen, everything=not planned.whole, briefly=several)
        if planned.made or not (planned.root / PAGE).exists():  # a kill may have come between
            page_after([planned.root])
        if several:
            stopping.poll()  # a signal that came when this point was all but done is meant for the others
    return points.Made(planned.root, planned.made, value)


def _screen() -> Any:
    """Where progress is shown; workers of a sweep would speak all at once, and are quiet."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from spin_reg.console import Screen

    hydra = HydraConfig.get()
    return Screen(quiet=hydra.mode == RunMode.MULTIRUN and hydra.runtime.choices["hydra/launcher"] != "basic")


def _show_plan(cfg: Any, *, typed: list[str], own: set[str], seen: list[Any]) -> None:
    from spin_reg import preview

    seen.append(_with_data(cfg, typed) if "--prepare" in own else _planned(cfg))
    preview.show_json(seen[-1]) if "--json" in own else preview.show(seen[-1], seen[:-1])


def _with_data(cfg: Any, typed: list[str]) -> Any:
    """The plan of a run whose data are made first, where they are not there."""
    from hydra.core.hydra_config import HydraConfig

    from spin_reg import launch

    screen = _screen()
    with stopping.listening(), screen.warnings():
        try:
            words = list(HydraConfig.get().overrides.task)
            planned = launch.with_data(_planned(cfg), listener=screen, command=typed, overrides=words)
        finally:
            screen.close()
        stopping.poll()  # a signal that came when the data were all but made is meant for the plan
    return planned
