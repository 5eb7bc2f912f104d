"""From a composed YAML tree to checked, plain values: `register()` gives Hydra the schemas, `load()` checks."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from spin_reg import benchmarks, corpora, redact, settings
from spin_reg.complaints import bad_value, config_error, holds_a_secret, unknown_key
from spin_reg.fingerprint import digest, flatten, identity, plain
from spin_reg.generation import Generation, check_engine
from spin_reg.metrics import EXACT_MATCH, HEALTHY, KNOWN_LANGUAGE, Healthy
from spin_reg.opponents import Regularizer, normalised
from spin_reg.regularizers import REGULARIZERS, name_of
from spin_reg.schedules import per_iteration

log = logging.getLogger(__name__)

GROUPS: dict[str, dict[str, type]] = {
    "model": {"tiny": settings.Tiny, "pretrained": settings.Pretrained},
    "dataset": {"toy": corpora.Toy, "jsonl": corpora.Jsonl, "hub": corpora.Hub, "mixture": corpora.Mixture},
    "regularizer": dict(REGULARIZERS),
    "schedule": {"default": settings.Schedule},
    "loss": {"base": settings.Loss},
    "generation": {"default": Generation},
    "evaluation": {"default": benchmarks.Evaluation},
    "tracker": {"base": settings.Tracker, "wandb": settings.Wandb},
    "hardware": {"default": settings.Hardware},
}


@dataclass
class Config:
    """All settings of a run."""

    model: settings.Model = field(default=cast(settings.Model, settings.MISSING))
    dataset: corpora.Dataset = field(default=cast(corpora.Dataset, settings.MISSING))
    regularizer: Regularizer | None = field(default=cast(Regularizer, settings.MISSING))  # None: no opponent
    schedule: settings.Schedule = field(default_factory=settings.Schedule)
    loss: settings.Loss = field(default_factory=settings.Loss)
    generation: Generation = field(default_factory=Generation)
    evaluation: benchmarks.Evaluation = field(default_factory=benchmarks.Evaluation)
    tracker: settings.Tracker = field(default_factory=settings.Tracker)
    hardware: settings.Hardware = field(default_factory=settings.Hardware)
    alpha: Any = None
    seed: int = 0
    objective: str | None = settings.runtime(None)
    keep_iterates: settings.KeepIterates = settings.runtime(settings.KeepIterates.all)
    run_name: str | None = None
    outputs: str = "outputs"


def _first(*values: Any) -> Any:
    return next((v for v in values if v is not None), None)


@cache
def register() -> None:
    """Store the schemas, in groups of their own, so that they are no choices, and the resolver `first`; done once."""
    store = ConfigStore.instance()
    store.store(group="schema", name="config", node=Config)
    for group, options in GROUPS.items():
        for name, node in options.items():
            store.store(group=f"schema/{group}", name=name, node=node)
    OmegaConf.register_new_resolver("first", _first, replace=True)


def load(cfg: DictConfig, *, sweep: bool = False, given: Sequence[str] = ()) -> Config:
    """Check a composed configuration and return it as plain values.

    Args:
        sweep: the run is a point of a sweep, where what has no effect is ignored: an alpha that the regularizer does
            not take, and of a loss without an opponent all that acts through one.
        given: the words that were typed, which tell such settings from defaults and experiments.

    Raises:
        ConfigError: an unknown key, a value out of range, or a setting without effect.
    """
    _refuse_unknown(cfg)
    try:
        config = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise config_error(error) from error
    except ValueError as error:
        raise bad_value(str(error)) from error
    assert isinstance(config, Config)
    try:
        _refuse_secrets(config)
        _check_run_name(config.run_name)
        config = _against_an_opponent(config, sweep) if config.loss.plays else _alone(config, sweep, given)
        _check_generation(config)
        _check_keep(config)
        _check_stop(config)
        _check_packages(config)
    except ValueError as error:
        raise bad_value(str(error)) from error
    return config


def _refuse_secrets(config: Config) -> None:
    """No setting may hold a credential: settings go into the run folder and to trackers."""
    for key, value in flatten(plain(config)).items():
        text = value if isinstance(value, str) else json.dumps(value) if isinstance(value, list) else ""
        secret = redact.found(text)
        if secret is not None:
            raise holds_a_secret(key, secret)


def _refuse_unknown(cfg: DictConfig) -> None:
    """`+key` and `++key` pass a typed schema silently; here every key must belong to a dataclass."""

    def walk(node: DictConfig, prefix: str) -> None:
        kind = OmegaConf.get_type(node)
        if not is_dataclass(kind):
            return
        known = [f.name for f in fields(kind)]
        for key in node:
            name = prefix + str(key)
            if str(key) not in known:
                raise unknown_key(name, [prefix + k for k in known])
            child = None if OmegaConf.is_missing(node, key) else node._get_node(key)
            if isinstance(child, DictConfig) and not child._is_none():
                walk(child, f"{name}.")

    walk(cfg, "")


def all_keys() -> list[str]:
    """Every key of every option of every group, for naming the nearest."""
    found = {f.name for f in fields(Config)}
    return sorted(found.union(*(keys_of(group, kind) for group, kinds in GROUPS.items() for kind in kinds.values())))


def keys_of(group: str, kind: type) -> list[str]:
    """Every key of an option of a group."""
    keys = []
    for f in fields(kind):
        keys.append(f"{group}.{f.name}")
        if isinstance(f.type, type) and is_dataclass(f.type):
            keys += keys_of(keys[-1], f.type)
    return keys


def _check_run_name(name: str | None) -> None:
    ok = name is None or (bool(name) and "/" not in name and "\\" not in name and not name.startswith("."))
    settings.check(ok, f"run_name={name}: give the name of one folder below outputs, without / and no dot in front")


def _check_keep(config: Config) -> None:
    keep = config.keep_iterates
    rule, iterations = config.regularizer, range(config.schedule.iterations)
    widest = 1 if rule is None else max(len(rule.opponent(t).window) for t in iterations)
    if keep is settings.KeepIterates.last:
        message = f"keep_iterates=last: this regularizer plays against {widest} iterates; give needed or all"
        settings.check(widest == 1, message)
    sent = keep is settings.KeepIterates.all or not getattr(config.tracker, "log_model", False)
    whole = keep is not settings.KeepIterates.last or not config.evaluation.crossplay
    settings.check(whole, f"keep_iterates={keep}: evaluation.crossplay=true asks every iterate; give needed or all")
    settings.check(sent, f"keep_iterates={keep}: tracker.log_model=true sends every iterate's weights; give all")


def _check_stop(config: Config) -> None:
    """A rule, and an objective, must be able to see what they ask for, and know which side of it is better."""
    rule, name = config.schedule.stop_when, config.objective
    if rule is not None:
        _check_seen(config, "schedule.stop_when", f"schedule.stop_when.metric={rule.metric}", rule.metric)
    if name is not None and name.count("/") == 2:
        task = name.split("/")[1]
        asked = [benchmark.task for benchmark in config.evaluation.benchmarks]
        settings.check(task in asked, f"objective={name}: evaluation.benchmarks does not ask for the task {task}")
    elif name is not None:
        known = [key for key, side in HEALTHY.items() if side is not Healthy.half]
        settings.check(name in known, f"objective={name}: give one of {', '.join(known)}, or eval/TASK/METRIC")
        _check_seen(config, "objective", f"objective={name}", name)


def _check_seen(config: Config, key: str, named: str, metric: str) -> None:
    settings.check(config.evaluation.enabled, f"{named}: nothing is evaluated; set {key}=null")
    asked = config.evaluation.exact_match.regex is not None or metric not in EXACT_MATCH
    settings.check(asked, f"{named}: nothing is matched; set evaluation=exact_match")
    known = isinstance(config.dataset, corpora.Toy) or metric not in KNOWN_LANGUAGE
    settings.check(known, f"{named}: it is known of dataset=toy alone; give eval/heldout_nll")


def _check_packages(config: Config) -> None:
    """What only some settings need is an extra; a missing one is told before anything begins."""
    for key, package, extra in extras(config.model):
        why = f"{key}: it needs the package {package}, which is not here: pip install spin-reg[{extra}]"
        settings.check(find_spec(package) is not None, why)


def extras(model: settings.Model) -> list[tuple[str, str, str]]:
    """What a model needs beside what every run does: the setting, the package, and the extra that brings it."""
    if not isinstance(model, settings.Pretrained):
        return []
    wanted = [
        (model.lora.rank > 0, "model.lora.rank", "peft", "lora"),
        (model.lora.quantize is not settings.Quantize.none, "model.lora.quantize", "bitsandbytes", "qlora"),
        (model.gguf_file is not None, "model.gguf_file", "gguf", "gguf"),
    ]
    return [(key, package, extra) for used, key, package, extra in wanted if used]


THROUGH_AN_OPPONENT = (  # settings that do nothing where there is none
    *("regularizer", "alpha", "schedule.beta", "loss.length_norm"),
    *("generation.temperature", "generation.top_p", "evaluation.crossplay"),  # own answers are judged at temperature 1
)


def _alone(config: Config, sweep: bool, given: Sequence[str]) -> Config:
    """The settings of a loss without an opponent: what would act through one is left out, so that equal runs are equal.

    Raises:
        ValueError: such a setting was typed, and not for a sweep.
    """
    keys = {word: word.lstrip("+~").partition("=")[0].partition("@")[0] for word in given}
    idle = [word for word, key in keys.items() if any(f"{key}.".startswith(f"{k}.") for k in THROUGH_AN_OPPONENT)]
    name = config.loss.name
    for word in idle:
        settings.check(sweep, f"{word}: loss={name} has no opponent, so this does nothing; leave it out")
    if idle:
        log.warning("%s: ignored here, loss=%s has no opponent", " ".join(idle), name)
    return replace(
        config,
        regularizer=None,
        alpha=None,
        schedule=replace(config.schedule, beta=None),
        loss=settings.Loss(name),
        generation=replace(config.generation, temperature=1.0, top_p=1.0),
        evaluation=replace(config.evaluation, crossplay=False),
    )


def _against_an_opponent(config: Config, sweep: bool) -> Config:
    """The settings of a loss with an opponent, checked."""
    rule, name = config.regularizer, config.loss.name
    if rule is None:
        raise ValueError(f"regularizer=null: loss={name} needs an opponent; give one")
    settings.check(config.schedule.beta is not None, f"schedule.beta=null: loss={name} needs a number above 0")
    _check_alpha(config, rule, sweep)
    _check_loss(config, rule)
    return config


def _check_alpha(config: Config, rule: Regularizer, sweep: bool) -> None:
    if config.alpha is None:
        return
    own = getattr(rule, "alpha", None)
    name = name_of(rule)
    if own is None:
        message = f"alpha={config.alpha}: regularizer={name} takes no alpha; leave it out or use regularizer=kl"
        settings.check(sweep, message)
        log.warning("alpha=%s is ignored here: regularizer=%s takes none", config.alpha, name)
    else:
        given = per_iteration("alpha", config.alpha, low=0.0, high=1.0)
        message = f"alpha={config.alpha}: regularizer.alpha={own} is set too and wins; give one of them"
        settings.check(given == own, message)


def _check_loss(config: Config, rule: Regularizer) -> None:
    """methods: a loss that is not invariant to log Z(x) needs a normalised reference."""
    if config.loss.length_norm is settings.LengthNorm.none:
        return
    for t in range(config.schedule.iterations):
        ok = normalised(rule.opponent(t).reference)
        settings.check(
            ok,
            f"loss.length_norm=mean: the reference of iteration {t} is a geometric mixture, unnormalised by log Z(x); "
            "Z cancels between two answers only while their log-ratios are not divided by length. Use loss.length_norm="
            "none, or a normalised reference (regularizer.reference=arithmetic, last or generator; alpha 0 or 1)",
        )


def _check_generation(config: Config) -> None:
    """What is played against are draws from an opponent; at temperature 0 it has none."""
    drawn = config.generation
    message = f"generation.temperature={drawn.temperature}: give a number above 0 (1 samples the policy itself)"
    settings.check(drawn.temperature > 0, message)
    check_engine(drawn, config.model, config.evaluation.exact_match.temperature)


OUTSIDE_IDENTITY = ("schedule.iterations", "evaluation", "tracker", "alpha", "run_name", "outputs")


def identity_settings(config: Config) -> dict[str, Any]:
    """The result-changing settings as a flat {dotted key: value}; what two runs must share to be the same run."""
    tree = _with_choices(config, identity(config, places=True))
    return {k: v for k, v in flatten(tree).items() if not k.startswith(OUTSIDE_IDENTITY)}


def _with_choices(config: Config, tree: dict[str, Any]) -> dict[str, Any]:
    groups = {group: getattr(config, group) for group in ("model", "dataset", "regularizer")}
    named = {group: {"_choice": choice(group, v), **tree[group]} for group, v in groups.items() if v is not None}
    return tree | named


def choice(group: str, value: Any) -> str:
    """The name under which a group's option stands in conf/."""
    return next(name for name, kind in GROUPS[group].items() if kind is type(value))


def run_name(config: Config) -> str:
    """The run's folder: `run_name`, or readable words and 6 hex digits over all result-changing settings."""
    if config.run_name is not None:
        return config.run_name
    words = [_tail(getattr(config.model, "name_or_path", choice("model", config.model)))]
    rank = getattr(getattr(config.model, "lora", None), "rank", 0)
    words.append(f"lora{rank}" if rank else "")
    words.append(_tail(getattr(config.dataset, "path", choice("dataset", config.dataset))))
    words += [_tail(part.path) for part in getattr(config.dataset, "parts", [])[:3]]
    rule = config.regularizer
    words += [str(config.loss.name)] if rule is None else [name_of(rule), rule.words()]
    words.append(f"seed{config.seed}")
    return "-".join([w for w in words if w] + [digest(identity_settings(config))[:6]])


def _tail(path: str) -> str:
    """The last part of a path or Hub name, without its ending, in characters every file system takes."""
    tail = path.rstrip("/").rpartition("/")[2].rpartition(".jsonl")[0] or path.rstrip("/").rpartition("/")[2]
    return "".join(c if c.isalnum() or c in "._" else "-" for c in tail).strip("-.") or "x"


def as_yaml(config: Config) -> str:
    """All settings as YAML, for the run folder."""
    return OmegaConf.to_yaml(OmegaConf.create(_with_choices(config, plain(config))))
