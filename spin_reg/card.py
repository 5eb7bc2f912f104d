"""The model card of an iterate: what it is, how it was trained, what was measured, how to load it; and of its pairs.

Nothing of the machine stands in it: of a local path its last part alone.
"""

import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from spin_reg import __version__, config, corpora, durable, hub, rundir, runner
from spin_reg.config import Config
from spin_reg.named import Named
from spin_reg.opponents import Arithmetic, Geometric, Iterate, Reference
from spin_reg.regularizers import name_of
from spin_reg.schedules import at
from spin_reg.settings import Pretrained
from spin_reg.sources import on_hub

PAPERS = "SPIN ([arXiv 2401.01335](https://arxiv.org/abs/2401.01335)), regularized "
PAPERS += "([arXiv 2404.04291](https://arxiv.org/abs/2404.04291))"


def log_formula(node: Reference) -> str:
    """log r(y|x) of a reference as people write it, the prompt left out: `1/2 log pi_0(y) + 1/2 log pi_2(y)`."""
    if isinstance(node, Iterate):
        return f"log pi_{node.k}(y)"
    if isinstance(node, Geometric):
        return " + ".join(f"{_exact(w)} {log_formula(part)}" for w, part in node.parts)
    if isinstance(node, Arithmetic):
        return "log(" + " + ".join(f"{_exact(w)} {_formula(part)}" for w, part in node.parts) + ")"
    return "log pi_k(y), k the iterate that gave the pair's generated answer"


def _formula(node: Reference) -> str:
    return f"pi_{node.k}(y)" if isinstance(node, Iterate) else f"exp({log_formula(node)})"


def _exact(weight: float) -> str:
    """A weight as the fraction that it is, or with all its digits."""
    simple = Fraction(weight).limit_denominator(1000)
    return str(simple) if float(simple) == weight else repr(weight)


def of_iterate(settings: Config, root: Path, iterate: Named, *, name: str, license: str | None) -> str:
    """The README.md of an exported iterate, with the front matter that the Hub reads.

    Args:
        name: of the folder, or on the Hub. license: an identifier; None: as the base's own card says, or none.
    """
    found = license or _license_of_base(settings)
    head = {
        "license": found,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": _hub_base(settings),
        "datasets": _hub_data(settings),
        "tags": [
            "spin-reg",
            "self-play",
            "spin",
            settings.loss.name.value if settings.regularizer is None else name_of(settings.regularizer),
        ],
    }
    parts = [
        _front(head),
        f"# {name}",
        f"Iterate {iterate.k} of the run `{root.name}`: {_origin(settings)}, {_trained(iterate.k)}. Made with spin-reg "
        f"{__version__} ({iterate.words}).",
        f"## How to load\n\n{_loading(settings, name)}",
        f"## What was measured\n\n{_measured(root, iterate.k)}",
        f"## How it was trained\n\n{_recipe(settings, iterate.k)}",
        f"## Data\n\nIt was trained on {_data(settings, root)}",
        f"## Settings\n\n{_settings(settings, root)}",
        "## License\n\n" + _license_words(license, found),
    ]
    return "\n\n".join(parts) + "\n"


def of_pairs(settings: Config, root: Path, t: int, *, name: str, license: str | None, columns: str, use: str) -> str:
    """The README.md of the pairs of iteration t; `columns` and `use` are their format's own words.

    It names no `configs`: with them `datasets` keeps a local folder in its cache under the folder's name alone, and a
    later export with that name would be read as this one.
    """
    head = {"license": license, "tags": ["spin-reg", "self-play", "preference"]}
    said = (
        f"What iteration {t} of the run `{root.name}` trained on: real answers, and those of the policies it played "
        f"against. Data: {_data(settings, root)} Made with spin-reg {__version__}."
    )
    table = _table(("t", "answers from", "log r(y)", *RATES), [_iteration(settings, t)])
    parts = [_front(head), f"# {name}", said, table, f"## Columns\n\n{columns}", f"## Use\n\n{use}"]
    return "\n\n".join([*parts, f"## Settings\n\n{_settings(settings, root)}"]) + "\n"


def _front(head: Mapping[str, Any]) -> str:
    known = {key: value for key, value in head.items() if value}
    return f"---\n{yaml.safe_dump(known, sort_keys=False, allow_unicode=True)}---"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _hub_base(settings: Config) -> str | None:
    model = settings.model
    return model.name_or_path if isinstance(model, Pretrained) and on_hub(model) else None


def _hub_data(settings: Config) -> list[str]:
    if not isinstance(settings.dataset, corpora.Corpus):
        return []
    named = [part.path for part in corpora.parts(settings.dataset) if isinstance(part, corpora.Hub)]
    return [path for path in dict.fromkeys(named) if not Path(path).expanduser().exists()]


def _license_of_base(settings: Config) -> str | None:
    """What the base's own model card says; None where it has none, or cannot be had."""
    model = settings.model
    if not isinstance(model, Pretrained):
        return None
    text = hub.readme(model) if on_hub(model) else _local_readme(Path(model.name_or_path).expanduser())
    _, _, behind = ("\n" + text).partition("\n---\n")
    try:
        head = yaml.safe_load(behind.partition("\n---")[0])
    except yaml.YAMLError:
        return None
    named = head.get("license") if isinstance(head, dict) else None
    return named if isinstance(named, str) else None


def _local_readme(folder: Path) -> str:
    path = folder / "README.md"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _license_words(given: str | None, found: str | None) -> str:
    if given is not None:
        return f"{given}, as it was given at the export."
    if found is not None:
        return f"{found}, as the base's own model card says; that of the data may ask for more."
    return "Not known: neither the base's model card nor the export named one."


def _origin(settings: Config) -> str:
    """The base, in words."""
    model = settings.model
    if not isinstance(model, Pretrained):
        return "over a small random Llama that an SFT stage fitted" if model.sft.epochs else "over a random Llama"
    place = model.name_or_path if on_hub(model) else f"the local folder {Path(model.name_or_path).name}"
    fitted = ", fitted by an SFT stage" if model.sft.epochs else ""
    adapted = "; a LoRA adapter was trained and merged" if model.lora.rank else ""
    return f"over {place}{fitted}{adapted}"


def _trained(k: int) -> str:
    return "not trained by self-play: the base" if k == 0 else f"after {k} iteration{'s' * (k > 1)} of self-play"


def _loading(settings: Config, name: str) -> str:
    own = settings.generation
    longest = own.max_new_tokens or settings.dataset.max_response_tokens
    asked = "A1" if isinstance(settings.dataset, corpora.Toy) else "Who are you?"
    return f"""\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {json.dumps(name)}  # the folder, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
prompt = [{{"role": "user", "content": {json.dumps(asked)}}}]
asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
drawn = model.generate(
    **asked, do_sample=True, temperature={own.temperature}, top_p={own.top_p}, top_k=0, max_new_tokens={longest}
)
print(tokenizer.decode(drawn[0, asked["input_ids"].shape[1] :], skip_special_tokens=True))
```

The tokenizer's chat template is the one it was trained with, and so are these numbers."""


def _measured(root: Path, k: int) -> str:
    """A table of what metrics.jsonl says of the iterate and of the base, with standard errors."""
    found: dict[int, dict[str, Any]] = {0: {}, k: {}}
    path = root / runner.METRICS
    for row in durable.read_jsonl(path) if path.is_file() else []:
        if row.get("iterate") in found:
            found[row["iterate"]] |= row
    names = [key for key in found[k] if key.startswith("eval/") and not key.endswith("_se")]
    if not names:
        return "Nothing was measured."
    columns = [k] if k == 0 else [k, 0]
    rows = [[name.removeprefix("eval/"), *(_value(found[i], name) for i in columns)] for name in names]
    titles = ["metric", *("base" if i == 0 else f"iterate {i}" for i in columns)]
    return f"{_table(titles, rows)}\n\nOn held-out prompts; ± one standard error. What each is: the README of spin-reg."


def _value(values: Mapping[str, Any], name: str) -> str:
    if name not in values:
        return ""
    error = f" ± {values[f'{name}_se']:.2g}" if f"{name}_se" in values else ""
    return f"{values[name]:.4g}{error}"


RATES = ("learning rate", "beta", "epochs")


def _iteration(settings: Config, t: int) -> list[str]:
    """A row of the table of iterations."""
    assert settings.regularizer is not None
    opponent, schedule = settings.regularizer.opponent(t), settings.schedule
    weights = [f"{_exact(w)} pi_{k}" if len(opponent.sampler) > 1 else f"pi_{k}" for k, w in opponent.sampler]
    rates = [f"{at(values, t):g}" for values in (schedule.learning_rate, schedule.beta, schedule.epochs)]
    return [str(t), ", ".join(weights), f"`{log_formula(opponent.reference)}`", *rates]


def _recipe(settings: Config, k: int) -> str:
    if k == 0:
        return "It is the base: self-play begins with it."
    if settings.regularizer is None:
        return "By continued SFT on the real answers, without an opponent: the mean NLL of their tokens is minimised."
    from spin_reg.losses import LOSSES

    loss = (LOSSES[settings.loss.name.value].__doc__ or "").partition("\n")[0].partition(":")[0].rstrip(".")
    mean = settings.loss.length_norm.value == "mean"
    each = ", each log-ratio divided by its answer's number of tokens" if mean else ""
    return f"""\
{PAPERS}: the policy is trained on SFT data to tell real answers y from those y' that earlier iterates
gave to the same prompts x. pi_0 is the base. Iteration t makes pi_(t+1) out of pi_t; over pairs (y, y') it minimises
the {settings.loss.name.value} loss of z = beta Delta: {loss}

    Delta = (log pi(y|x) - log r(y|x)) - (log pi(y'|x) - log r(y'|x))

in nats{each}. The reference r of each iteration, and who gave y', were (x left out):

{_table(("t", "answers from", "log r(y)", *RATES), [_iteration(settings, t) for t in range(k)])}

A geometric mixture lacks log Z(x), which is the same for both answers and so cancels in Delta."""


def _data(settings: Config, root: Path) -> str:
    """Which data, pinned by hash or commit, in words."""
    data = settings.dataset
    saved = rundir.provenance(root) or {}
    (pins,) = (saved.get("sources", {}).get("data") or {"sha256": [None]})["sha256"]
    if not isinstance(data, corpora.Corpus):
        return f"the toy language of spin-reg (no text of people), grammar and draws by seed {data.seed}."
    listed = zip(corpora.parts(data), str(pins).split(","), strict=False)
    return "; ".join(_part(part, pin) for part, pin in listed) + "."


def _part(part: Any, pin: str) -> str:
    if isinstance(part, corpora.Hub) and not Path(part.path).expanduser().exists():
        subset = f", subset {part.subset}" if part.subset else ""
        return f"{part.path}{subset}, split {part.split}, at revision `{pin}`"
    return f"the local {'folder' if isinstance(part, corpora.Hub) else 'file'} {Path(part.path).name}, SHA-256 `{pin}`"


def _settings(settings: Config, root: Path) -> str:
    saved = rundir.provenance(root) or {}
    shown = {key: _public(value) for key, value in config.identity_settings(settings).items()}
    text = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in shown.items())
    made = ", ".join(f"{name} {version}" for name, version in saved.get("versions", {}).items())
    return f"```yaml\n{text}\n```\n\nVersions: {made}."


def _public(value: Any) -> Any:
    """A setting as others may see it: of a path on this machine the last part."""
    if isinstance(value, dict):
        return {key: _public(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_public(one) for one in value]
    local = isinstance(value, str) and "/" in value and Path(value).expanduser().exists()
    return Path(value).name if local or (isinstance(value, str) and value.startswith(("/", "~"))) else value
