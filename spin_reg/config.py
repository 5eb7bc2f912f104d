"""From a composed YAML tree to checked, plain values: `register()` gives Hydra the schemas, `load()` checks."""

import difflib
import json
import logging
from dataclasses import dataclass, field, fields, is_dataclass
from importlib.util import find_spec
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from spin_reg import benchmarks, corpora, redact, settings
from spin_reg.errors import ConfigError
from spin_reg.fingerprint import digest, identity, plain
from spin_reg.metrics import EXACT_MATCH, KNOWN_LANGUAGE
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
    "generation": {"default": settings.Generation},
    "evaluation": {"default": benchmarks.Evaluation},
    "tracker": {"base": settings.Tracker, "wandb": settings.Wandb},
    "hardware": {"default": settings.Hardware},
}


@dataclass
class Config:
    """All settings of a run."""

    model: settings.Model = field(default=cast(settings.Model, settings.MISSING))
    dataset: corpora.Dataset = field(default=cast(corpora.Dataset, settings.MISSING))
    regularizer: Regularizer = field(default=cast(Regularizer, settings.MISSING))
    schedule: settings.Schedule = field(default_factory=settings.Schedule)
    loss: settings.Loss = field(default_factory=settings.Loss)
    generation: settings.Generation = field(default_factory=settings.Generation)
    evaluation: benchmarks.Evaluation = field(default_factory=benchmarks.Evaluation)
    tracker: settings.Tracker = field(default_factory=settings.Tracker)
    hardware: settings.Hardware = field(default_factory=settings.Hardware)
    alpha: Any = None
    seed: int = 0
    keep_iterates: settings.KeepIterates = settings.runtime(settings.KeepIterates.all)
    run_name: str | None = None
    outputs: str = "outputs"


def _first(*values: Any) -> Any:
    return next((v for v in values if v is not None), None)


def register() -> None:
    """Store the schemas (in groups of their own, so that they are no choices) and the resolver `first`."""
    store = ConfigStore.instance()
    store.store(group="schema", name="config", node=Config)
    for group, options in GROUPS.items():
        for name, node in options.items():
            store.store(group=f"schema/{group}", name=name, node=node)
    OmegaConf.register_new_resolver("first", _first, replace=True)


def load(cfg: DictConfig, *, sweep: bool = False) -> Config:
    """Check a composed configuration and return it as plain values.

    Args:
        sweep: the run is a point of a sweep, where an alpha that the regularizer does not take is ignored.

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
        _check_alpha(config, sweep)
        _check_loss(config)
        _check_generation(config.generation)
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


def holds_a_secret(key: str, secret: str) -> ConfigError:
    """The error for a setting with a secret in it; its value is not echoed."""
    return ConfigError(
        "A setting holds a secret.",
        where=key,
        why=f"it has {secret}, and settings are written into the run folder and sent to trackers",
        todo="take it out; credentials belong into the environment (HF_TOKEN, WANDB_API_KEY) or a netrc file",
    )


def bad_value(message: str) -> ConfigError:
    """A ConfigError from a `key=value: what is allowed` message."""
    key, _, allowed = message.partition(": ")
    if not allowed:
        key, allowed = "the configuration", message
    return ConfigError("A setting cannot be used.", where=key, why=allowed, todo="change it and run again")


def config_error(error: OmegaConfBaseException) -> ConfigError:
    """A ConfigError from one of OmegaConf's."""
    key = getattr(error, "full_key", None) or "the configuration"
    why = str(error).splitlines()[0]
    if "issing mandatory value" in why:
        return ConfigError("A setting must be given.", where=key, why="it has no default", todo=f"add {key}=...")
    return ConfigError("A setting cannot be used.", where=key, why=why, todo=f"give {key} another value")


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


def unknown_key(key: str, known: list[str]) -> ConfigError:
    """A ConfigError that names the nearest keys."""
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    todo = "did you mean " + " or ".join(near) + "?" if near else "known here: " + ", ".join(sorted(known))
    return ConfigError(f"There is no setting {key}.", where=key, why="no part of the configuration has it", todo=todo)


def all_keys() -> list[str]:
    """Every key of every option of every group, for naming the nearest."""
    keys = [f.name for f in fields(Config)]

    def walk(kind: type, prefix: str) -> None:
        for f in fields(kind):
            keys.append(f"{prefix}{f.name}")
            if isinstance(f.type, type) and is_dataclass(f.type):
                walk(f.type, f"{prefix}{f.name}.")

    for group, options in GROUPS.items():
        for kind in options.values():
            walk(kind, f"{group}.")
    return sorted(set(keys))


def _check_run_name(name: str | None) -> None:
    ok = name is None or (bool(name) and "/" not in name and "\\" not in name and not name.startswith("."))
    settings.check(ok, f"run_name={name}: give the name of one folder below outputs, without / and no dot in front")


def _check_keep(config: Config) -> None:
    keep = config.keep_iterates
    widest = max(len(config.regularizer.opponent(t).window) for t in range(config.schedule.iterations))
    if keep is settings.KeepIterates.last:
        message = f"keep_iterates=last: this regularizer plays against {widest} iterates; give needed or all"
        settings.check(widest == 1, message)
    sent = keep is settings.KeepIterates.all or not getattr(config.tracker, "log_model", False)
    whole = keep is not settings.KeepIterates.last or not config.evaluation.crossplay
    settings.check(whole, f"keep_iterates={keep}: evaluation.crossplay=true asks every iterate; give needed or all")
    settings.check(sent, f"keep_iterates={keep}: tracker.log_model=true sends every iterate's weights; give all")


def _check_stop(config: Config) -> None:
    """A rule must be able to see what it asks for."""
    rule = config.schedule.stop_when
    if rule is None:
        return
    named = f"schedule.stop_when.metric={rule.metric}"
    settings.check(config.evaluation.enabled, f"{named}: nothing is evaluated; set schedule.stop_when=null")
    asked = config.evaluation.exact_match.regex is not None or rule.metric not in EXACT_MATCH
    settings.check(asked, f"{named}: nothing is matched; set evaluation=exact_match")
    known = isinstance(config.dataset, corpora.Toy) or rule.metric not in KNOWN_LANGUAGE
    settings.check(known, f"{named}: it is known of dataset=toy alone; give eval/heldout_nll")


def _check_packages(config: Config) -> None:
    """What only some settings need is an extra; a missing one is told before anything begins."""
    model = config.model
    if not isinstance(model, settings.Pretrained):
        return
    wanted = [
        (model.lora.rank > 0, "model.lora.rank", "peft", "lora"),
        (model.lora.quantize is not settings.Quantize.none, "model.lora.quantize", "bitsandbytes", "qlora"),
        (model.gguf_file is not None, "model.gguf_file", "gguf", "gguf"),
    ]
    for used, key, package, extra in wanted:
        there = not used or find_spec(package) is not None
        settings.check(
            there, f"{key}: it needs the package {package}, which is not here: pip install spin-reg[{extra}]"
        )


def _check_alpha(config: Config, sweep: bool) -> None:
    if config.alpha is None:
        return
    own = getattr(config.regularizer, "alpha", None)
    name = name_of(config.regularizer)
    if own is None:
        message = f"alpha={config.alpha}: regularizer={name} takes no alpha; leave it out or use regularizer=kl"
        settings.check(sweep, message)
        log.warning("alpha=%s is ignored here: regularizer=%s takes none", config.alpha, name)
    else:
        given = per_iteration("alpha", config.alpha, low=0.0, high=1.0)
        message = f"alpha={config.alpha}: regularizer.alpha={own} is set too and wins; give one of them"
        settings.check(given == own, message)


def _check_loss(config: Config) -> None:
    """methods: a loss that is not invariant to log Z(x) needs a normalised reference."""
    if config.loss.length_norm is settings.LengthNorm.none:
        return
    for t in range(config.schedule.iterations):
        ok = normalised(config.regularizer.opponent(t).reference)
        settings.check(
            ok,
            f"loss.length_norm=mean: the reference of iteration {t} is a geometric mixture, unnormalised by log Z(x); "
            "Z cancels between two answers only while their log-ratios are not divided by length. Use loss.length_norm="
            "none, or a normalised reference (regularizer.reference=arithmetic, last or generator; alpha 0 or 1)",
        )


def _check_generation(generation: settings.Generation) -> None:
    """What is played against are draws from an opponent; at temperature 0 it has none."""
    ok = generation.temperature > 0
    settings.check(
        ok, f"generation.temperature={generation.temperature}: give a number above 0 (1 samples the policy itself)"
    )


OUTSIDE_IDENTITY = ("schedule.iterations", "evaluation", "tracker", "alpha", "run_name", "outputs")


def identity_settings(config: Config) -> dict[str, Any]:
    """The result-changing settings as a flat {dotted key: value}; what two runs must share to be the same run."""
    tree = identity(config)
    for group in ("model", "dataset", "regularizer"):
        tree[group] = {"_choice": choice(group, getattr(config, group)), **tree[group]}
    return {k: v for k, v in flatten(tree).items() if not k.startswith(OUTSIDE_IDENTITY)}


def choice(group: str, value: Any) -> str:
    """The name under which a group's option stands in conf/."""
    return next(name for name, kind in GROUPS[group].items() if kind is type(value))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict as {dotted key: leaf}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def run_name(config: Config) -> str:
    """The run's folder: `run_name`, or readable words and 6 hex digits over all result-changing settings."""
    if config.run_name is not None:
        return config.run_name
    words = [_tail(getattr(config.model, "name_or_path", choice("model", config.model)))]
    rank = getattr(getattr(config.model, "lora", None), "rank", 0)
    words.append(f"lora{rank}" if rank else "")
    words.append(_tail(getattr(config.dataset, "path", choice("dataset", config.dataset))))
    words += [_tail(part.path) for part in getattr(config.dataset, "parts", [])[:3]]
    words += [name_of(config.regularizer), config.regularizer.words(), f"seed{config.seed}"]
    return "-".join([w for w in words if w] + [digest(identity_settings(config))[:6]])


def _tail(path: str) -> str:
    """The last part of a path or Hub name, without its ending, in characters every file system takes."""
    tail = path.rstrip("/").rpartition("/")[2].rpartition(".jsonl")[0] or path.rstrip("/").rpartition("/")[2]
    return "".join(c if c.isalnum() or c in "._" else "-" for c in tail).strip("-.") or "x"


def as_yaml(config: Config) -> str:
    """All settings as YAML, for the run folder."""
    tree = plain(config)
    for group in ("model", "dataset", "regularizer"):
        tree[group] = {"_choice": choice(group, getattr(config, group)), **tree[group]}
    return OmegaConf.to_yaml(OmegaConf.create(tree))
