"""README is true: its tree, its table of regularizers, its groups."""

import re

from conftest import ROOT

from spin_reg.regularizers import REGULARIZERS

TEXT = (ROOT / "README.md").read_text()


def test_the_tree_names_every_module_and_only_those() -> None:
    tree = TEXT.split("## The code")[1].split("```")[1]
    inside = tree.split("spin_reg/\n")[1]
    named = set(re.findall(r"(\w+\.(?:py|yaml)|\w+/)", inside))
    there = {p.name + ("/" if p.is_dir() else "") for p in (ROOT / "spin_reg").iterdir()}
    assert named == {n for n in there if not n.startswith("__")}
    stages = {p.stem for p in (ROOT / "spin_reg" / "stages").glob("[a-z]*.py")}
    assert all(re.search(rf"stages/.*\b{stage}\b", inside) for stage in stages)
    top = set(re.findall(r"^(\w+)/", tree, flags=re.M))
    assert top == {"conf", "docs", "outputs", "scripts", "tests", "spin_reg"}
    assert all((ROOT / name).is_dir() for name in top)
    scripts = {p.name for p in (ROOT / "scripts").glob("*.py")} | {
        f"{p.parent.name}/" for p in (ROOT / "scripts").glob("*/__main__.py")
    }
    assert all(script in tree for script in scripts)


def test_every_regularizer_stands_in_the_table() -> None:
    table = TEXT.split("| `regularizer=` |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, flags=re.M)) == set(REGULARIZERS)


def test_the_first_two_commands_are_one_line_each() -> None:
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, flags=re.S)
    assert len(blocks) == 2 and all(block.count("\n") == 1 for block in blocks)
    assert blocks[0].rstrip().endswith("spin-reg train regularizer=kl alpha=0.5")
    assert blocks[1].rstrip().endswith("pytest")


def test_pictures_and_links_are_there() -> None:
    for target in re.findall(r"\]\(((?!http)[^)#]+)", TEXT):
        assert (ROOT / target).exists(), target
