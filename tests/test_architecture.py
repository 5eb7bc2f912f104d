"""Who may import what: the floors of the building, read off the imports."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "spin_reg"
STD = {"__future__"}
GROUND = {
    "errors",
    "fingerprint",
    "schedules",
    "metrics",
    "opponents",
    "kept",
    "judged",
    "mt_bench",
    "regularizers",
    "settings",
    "generation",
    "corpora",
    "benchmarks",
    "exact",
    "roles",
    "specs",
    "context",
    "redact",
    "stopping",
    "child",
    "vllm_child",
    "vllm_engine",
    "vllm_python",
    "usage",
    "wire",
    "jobs",
    "grammar",
    "verbs",
    "manual",
    "machine",
}
FLOORS: list[tuple[set[str], set[str]]] = [
    (GROUND, set()),
    ({"config", "complaints"}, {"omegaconf", "hydra"}),
    ({"logprobs", "losses", "packing"}, {"torch"}),
    (
        {
            "durable",
            "sources",
            "hub",
            "sizes",
            "tables",
            "footers",
            "toy",
            "render",
            "templates",
            "rows",
            "layouts",
            "spool",
            "index",
            "data",
            "models",
            "iterates",
            "adapters",
            "sampling",
        }
        | {
            "checkpoint",
            "fit",
            "diagnostics",
            "join",
            "branches",
            "columns",
            "decoder",
            "products",
            "gpus",
            "scorer",
            "trial",
            "selfcheck",
            "harness",
            "answering",
            "ranks",
            "sharing",
            "zero",
        }
        | {"questions", "judging", "asking", "replies"},
        {
            "torch",
            "numpy",
            "pyarrow",
            "transformers",
            "tokenizers",
            "datasets",
            "accelerate",
            "safetensors",
            "peft",
            "gguf",
            "huggingface_hub",
            "jinja2",
            "yaml",
            "httpx2",
            "deepspeed",
        },
    ),
    ({"stages"}, {"torch", "numpy", "pyarrow", "transformers", "accelerate", "safetensors"}),
    (
        {
            "plan",
            "stage",
            "policies",
            "judges",
            "pace",
            "origins",
            "versions",
            "survey",
            "claims",
            "rundir",
            "known",
            "runner",
            "processes",
            "launched",
            "worker",
            "launch",
            "outlook",
            "amounts",
            "stored",
            "space",
            "estimate",
            "remedies",
        }
        | {"named", "runlog", "results", "tracking", "groups"},
        {"filelock", "wandb", "accelerate", "torch"},
    ),
    (
        {
            "cli",
            "single",
            "console",
            "scoreboard",
            "overrides",
            "runs",
            "export",
            "vetting",
            "status",
            "sheet",
            "compare",
            "listing",
            "sweeps",
            "points",
            "card",
            "handover",
            "preview",
            "sample",
            "completion",
            "report",
        },
        {"hydra", "rich", "omegaconf", "yaml", "jinja2", "resvg_py", "pyarrow"},
    ),
]
LATE_ONLY = {
    "launch",
    "runner",
    "tracking",
    "cli",
    "overrides",
    "runs",
}  # may import what loads torch, but inside functions


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor(name: str) -> int:
    return next(i for i, (modules, _) in enumerate(FLOORS) if name in modules)


def imports(tree: ast.AST) -> set[str]:
    """Dotted names imported, with `from spin_reg import x` as spin_reg.x."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            own = node.module == "spin_reg"
            found |= {f"spin_reg.{alias.name}" for alias in node.names} if own else {node.module}
    return found


MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__main__.py" and p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_the_floors(path: Path) -> None:
    import sys

    name = part(path)
    mine, (_, outside) = floor(name), FLOORS[floor(name)]
    for module in imports(ast.parse(path.read_text())):
        top, _, rest = module.partition(".")
        if top == "spin_reg":
            target = rest.partition(".")[0]
            if target and target != "__version__":
                assert floor(target) <= mine, f"{name} imports {module} from above"
                if name in {"models", "fit"} | {"stages"}:
                    assert target != "config"
        elif top not in sys.stdlib_module_names:
            assert top in outside, f"{name} may not import {module}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_module_is_long_and_no_function(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 340
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno <= 66, f"{path.name}: {node.name}"


def test_no_circle_of_imports_when_modules_load() -> None:
    """Whichever module is imported first: what is imported inside functions does not count."""

    def needs(path: Path) -> set[str]:
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        return {name.split(".")[1] for name in imports(ast.Module(top, [])) if name.startswith("spin_reg.")}

    left = {part(path): needs(path) for path in MODULES if path.parent == PACKAGE}
    while ready := [name for name, needed in left.items() if not needed & set(left)]:
        for name in ready:
            del left[name]
    assert not left
