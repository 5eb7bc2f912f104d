"""`spin-reg report`: statistics against numpy, drawings read back as numbers, pages read as a browser reads them."""

import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import browser
import numpy as np
import pytest
from conftest import SMALL, Command
from runfolders import KL, damage, run

from spin_reg import opponents
from spin_reg.opponents import Iterate
from spin_reg.report import charts, figures, gather, groups, ink, page, sheets, story, svg, verb
from spin_reg.report.charts import Head, Look, Point, Series

RNG = np.random.default_rng(0)
SVG = "{http://www.w3.org/2000/svg}"
INK = ink.inks(["none"])[0]
HEAD = Head("title", "words", "about")
EVIL = "</text><script>alert(1)</script>&amp;\x00\x1b\ud800"


class Read(HTMLParser):
    """Elements, texts and addresses of a page; every element must be closed in order."""

    VOID = {"meta", "link", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def drawings(text: str) -> list[ElementTree.Element]:
    """The drawings of a page, each as XML of its own."""
    return [ElementTree.fromstring(found) for found in re.findall(r"<svg .*?</svg>", text, flags=re.S)]


def write(*folders: Path, **options: Any) -> str:
    return verb.report(folders, **options).page.read_text(encoding="utf-8")


def sweep(outputs: Path) -> Path:
    """Two seeds of SPIN and of three strengths, three iterations each."""
    for seed in (0, 1):
        for alpha in (None, 0.25, 0.5, 1.0):
            settings = {"seed": seed} | ({} if alpha is None else KL | {"regularizer.alpha": [alpha]})
            values = [3.5 + 0.1 * seed, 3.3 + (alpha or 0), 3.1 + 0.2 * seed, 3.2 - (alpha or 0) * 0.1]
            curves = {"kl_data": values, "heldout_nll": [v / 3 for v in values], "length_mean": [7, 8, 9, 10.0]}
            matrix = {(1, 0): 0.6, (2, 0): 0.4 + 0.1 * seed, (2, 1): 0.9}
            run(outputs / f"run-{alpha}-{seed}", curves, settings, crossplay=matrix)
    return outputs


def affine(drawing: ElementTree.Element, anchor: str) -> Callable[[float], float]:
    """From pixels to values, read off the tick labels of one axis."""
    axis = "y" if anchor == "end" else "x"
    ticks = []
    for one in drawing.iter(f"{SVG}text"):
        words = (one.text or "").replace("−", "-").replace("base", "0" if axis == "x" else "base")
        if one.get("text-anchor") == anchor and re.fullmatch(r"-?[\d.]+", words):
            ticks.append((float(one.get(axis, "")) - (3.8 if axis == "y" else 0), float(words)))
    (a, low), *_, (b, high) = ticks
    return lambda pixel: low + (pixel - a) / (b - a) * (high - low)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 4321.0])
@pytest.mark.parametrize("look", [Look(), Look(860, 400, labels=True), Look(350, 300, band=False)])
def test_a_curve_can_be_read_off_its_axes(look: Look, scale: float) -> None:
    values = RNG.normal(size=6) * scale
    points = tuple(Point(k, v, v - 0.1 * scale, v + 0.2 * scale, note="n") for k, v in enumerate(values))
    text = charts.by_iterate([Series("none", INK, points, ring=2)], HEAD, look)
    drawing = ElementTree.fromstring(text)
    x, y = affine(drawing, "middle"), affine(drawing, "end")
    circles = list(drawing.iter(f"{SVG}circle"))
    dots = [one for one in circles if one.get("fill") != "none"]
    assert [x(float(one.get("cx", ""))) for one in dots] == pytest.approx(range(6), abs=0.03)
    reach = max(values) - min(values)
    assert [y(float(one.get("cy", ""))) for one in dots] == pytest.approx(list(values), abs=0.006 * reach)
    (ring,) = (one for one in circles if one.get("fill") == "none")
    assert x(float(ring.get("cx", ""))) == pytest.approx(2, abs=0.03)
    spread = next(drawing.iter(f"{SVG}path")).get("d", "") if look.band else ""
    tops = [float(part.split(" ")[1]) for part in re.split("[MLZ]+", spread) if part]
    if look.band:  # the first piece: low at 0 and 1, high at 1 and 0
        wanted = [points[0].low, points[1].low, points[1].high, points[0].high]
        assert [y(top) for top in tops[:4]] == pytest.approx(wanted, abs=0.006 * reach)
    assert all(0 <= float(one.get("cx", "")) <= look.width for one in dots)
    assert len(list(drawing.iter(f"{SVG}rect"))) == 6


def test_ticks_are_few_round_and_inside() -> None:
    for low, width in zip(RNG.normal(size=300) * 50, 10.0 ** RNG.uniform(-6, 6, size=300), strict=True):
        made = svg.ticks(low, low + width)
        steps = np.diff(made)
        assert 2 <= len(made) <= 5 and np.allclose(steps, steps[0], rtol=1e-4)
        assert low - 1e-9 * width <= made[0] and made[-1] <= low + width * (1 + 1e-9)
        assert max(abs(math.log10(steps[0] / f) % 1 - 0.5) for f in (1, 2, 5)) == pytest.approx(0.5, abs=1e-3)
    assert svg.number(-0.00001) == "0.000" and svg.number(-12.345) == "−12.35" and svg.number(1234.5) == "1234"


@pytest.mark.parametrize(
    ("key", "values", "said"),
    [
        ("model.lora.alpha", (2, 8), "lora.alpha 2"),
        ("model.sft.learning_rate", (1e-2, 1e-3), "sft.learning_rate 0.01"),
        ("model.sft.batch_size", (32, 8), "sft.batch_size 32"),
        ("dataset.seed", (0, 1), "dataset.seed 0"),
        ("loss.name", ("ipo", "logistic"), "loss ipo"),
        ("schedule.beta", (0.1, 1.0), "beta 0.1"),
    ],
)
def test_a_label_names_one_setting_and_no_other(key: str, values: tuple[Any, Any], said: str) -> None:
    shared = {"regularizer._choice": "kl", "regularizer.alpha": 0.5, "seed": 0, "schedule.learning_rate": 0.1}
    shared |= {"loss.name": "logistic", "schedule.batch_size": 8, "dataset._choice": "toy", "schedule.beta": 1}
    assert groups.label([shared | {key: value} for value in values])[0] == f"kl 0.5, {said}"


def test_names_beside_curves_never_touch_and_keep_their_order() -> None:
    for n in (1, 2, 5, 12):
        wanted = sorted(RNG.uniform(0, 200, size=n))
        made = charts.apart(wanted, 15, 0, 200)
        assert all(b - a >= 15 - 1e-9 for a, b in zip(made, made[1:], strict=False))
        assert made[0] >= 0 and made[-1] <= 200 + 1e-9
    assert charts.apart([10, 100], 15, 0, 200) == [10, 100]


def test_names_on_paper_have_contrast_in_light_and_dark() -> None:
    def luminance(colour: str) -> float:
        parts = [c / 255 for c in bytes.fromhex(colour[1:])]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    made = ink.inks(["none", *["kl"] * 5, "fictitious_play", "mixture_of_two", "base", "a", "b", "c"])
    for dark in (False, True):
        values = ink.variables(made, dark=dark)
        paper = luminance(values["paper"])
        for name in ("ink", "soft", *(f"s{i}" for i in range(len(made)))):
            low, high = sorted((paper, luminance(values[name])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (name, dark)
    assert len({(one.light, one.dash) for one in made}) == len(made)


def test_means_spreads_and_paired_differences_are_numpys(tmp_path: Path) -> None:
    values = RNG.normal(size=(2, 3, 4)) + 5
    for g, settings in enumerate(({}, KL | {"regularizer.alpha": [0.5]})):
        for seed in range(3):
            run(tmp_path / f"{g}-{seed}", {"kl_data": list(values[g, seed])}, settings | {"seed": seed})
    found, failures = gather.runs(gather.roots([tmp_path]))
    made, repeats = groups.group(found)
    assert [one.label for one in made] == ["none", "kl 0.5"] and not failures and not repeats
    for g, one in enumerate(made):
        curve = groups.curve(one, "eval/kl_data")
        assert [s.mean for s in curve.values()] == pytest.approx(list(values[g].mean(0)))
        assert [s.sd for s in curve.values()] == pytest.approx(list(values[g].std(0, ddof=1)))
    first, second = (groups.verdicts(one, "eval/kl_data") for one in made)
    differences = values[1].min(1) - values[0].min(1)
    paired = groups.paired(second, first, lambda v: v.best)
    assert paired is not None and paired.n == 3
    assert paired.mean == pytest.approx(differences.mean()) and paired.sd == pytest.approx(differences.std(ddof=1))
    rises = np.maximum(np.diff(values[0], axis=1), 0).sum(1)
    assert [v.instability for v in first.values()] == pytest.approx(list(rises))
    one_seed = groups.paired({0: second[0]}, {0: first[0], 1: first[1]}, lambda v: v.last)
    assert one_seed is not None and one_seed.sd is None and one_seed.n == 1


def test_runs_are_grouped_by_all_settings_but_the_seed(tmp_path: Path) -> None:
    curve = {"kl_data": [3.0, 2.0]}
    run(tmp_path / "a", curve, {"seed": 0})
    run(tmp_path / "again", {"kl_data": [3.0, 2.0, 1.0]}, {"seed": 0})  # the same, played on: it stands for both
    run(tmp_path / "b", curve, {"seed": 1})
    run(tmp_path / "c", curve, {"schedule.beta": [0.1, 0.1]})
    run(tmp_path / "d", curve, KL | {"regularizer.alpha": [0.5, 1.0]})
    run(tmp_path / "e", curve, {"seed": 2}, data="0123456789")  # its file holds something else by now
    found, _ = gather.runs(gather.roots([tmp_path]))
    made, repeats = groups.group(found)
    assert [(one.label, sorted(one.runs)) for one in made] == [
        ("none, beta 0.1, data 8badf00d", [0]),
        ("none, data 01234567", [2]),
        ("none, data 8badf00d", [0, 1]),
        ("kl 0.5/1, data 8badf00d", [0]),
    ]
    assert [one.root.name for one in repeats] == ["a"]
    assert "repeat the settings and the seed of another run: a." in write(tmp_path)


def test_training_points_are_means_of_steps_and_of_seeds(tmp_path: Path) -> None:
    for seed in (0, 1):
        run(tmp_path / f"{seed}", {"kl_data": [1.0, 2.0, 3.0]}, {"seed": seed}, steps=10)
    (one,), _ = groups.group(gather.runs(gather.roots([tmp_path]))[0])
    whole, longest = groups.training(one, "train/loss", most=10)
    assert longest == 1 and [y for _, y in whole[0]] == pytest.approx([0.7 - 0.01 * s for s in range(1, 11)])
    assert [x for x, _ in whole[1]] == pytest.approx([1 + s / 10 for s in range(1, 11)])
    few, longest = groups.training(one, "train/loss", most=4)
    assert longest == 3 and [y for _, y in few[0]] == pytest.approx([0.68, 0.65, 0.62, 0.6])


def test_references_as_one_writes_them() -> None:
    window = opponents.arithmetic([(1 / 3, Iterate(k)) for k in range(3)])
    assert gather.compared(window) == "mean of π₀, π₁, π₂"
    assert gather.compared(opponents.geometric([(0.25, Iterate(0)), (0.75, Iterate(12))])) == "π₀^0.25 · π₁₂^0.75"
    assert gather.compared(opponents.geometric([(0.5, Iterate(0)), (0.5, window)])) == (
        "(mean of π₀, π₁, π₂)^0.5 · π₀^0.5"
    )
    assert gather.compared(opponents.arithmetic([(0.25, Iterate(0)), (0.75, Iterate(1))])) == "0.25 π₀ + 0.75 π₁"


def test_a_sweep_has_every_figure_and_asks_nobody(tmp_path: Path) -> None:
    made = verb.report([sweep(tmp_path)])
    text = made.page.read_text(encoding="utf-8")
    found = Read(text)
    assert made.page == tmp_path / "report.html"
    keys = [attributes["id"] for name, attributes in found.elements if name == "section"]
    assert keys == ["overview", "strength", "quality", "drift", "crossplay", "training", "numbers", "settings"]
    assert len(drawings(text)) == text.count("<svg ") == found.count("svg") > 12
    links = [v for _, a in found.elements for k, v in a.items() if k in ("href", "src", "action", "srcset")]
    assert all(re.match(r"#|data:,|[\w.-]+/report\.html$", link or "") for link in links)
    rest = text.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"^\s*// .*$", "", rest, flags=re.M))
    files = {path.stem for path in (tmp_path / "figures").glob("*.svg")}
    assert {"kl_data", "heldout_nll", "length_mean", "strength", "stability", "train-loss", "crossplay-0"} <= files
    for path in (tmp_path / "figures").glob("*.svg"):
        content = path.read_text()
        assert ElementTree.fromstring(content) is not None and "var(" not in content and len(files) == made.count
    assert text == write(tmp_path)  # the same folders, the same page


def test_strength_is_drawn_over_the_alphas_with_spin_as_zero(tmp_path: Path) -> None:
    runs, _ = gather.runs(gather.roots([sweep(tmp_path)]))
    (figure,) = figures.strengths(story.told(runs, None, []))
    drawing = ElementTree.fromstring(figure.draw(Look()))
    x, y = affine(drawing, "middle"), affine(drawing, "end")
    spots = [one for one in drawing.iter(f"{SVG}circle") if one.get("class") == "hit"]
    read = [(x(float(one.get("cx", ""))), y(float(one.get("cy", "")))) for one in spots]
    alphas = [0.0, 0.25, 0.5, 1.0]
    assert [at for at, _ in read] == pytest.approx(alphas * 2, abs=0.01)
    best = [np.mean([min(3.1 + 0.2 * s, 3.2 - a * 0.1, 3.3 + a) for s in (0, 1)]) for a in alphas]
    assert [value for _, value in read] == pytest.approx([*best, *(3.2 - a * 0.1 for a in alphas)], abs=0.003)
    hollow = [one.get("d", "") for one in drawing.iter(f"{SVG}path") if one.get("fill") == "var(--paper)"]
    middles = [np.mean([float(part.split(" ")[1]) for part in re.split("[MLZ]", d) if part]) for d in hollow]
    assert [y(float(middle)) for middle in middles] == pytest.approx(best, abs=0.003)  # squares: the best


def test_what_models_and_settings_say_stays_text(tmp_path: Path) -> None:
    sample = {"prompt": EVIL, "real": "<b>real</b>", "generated": '<img src=x onerror="alert(1)">' + EVIL}
    evil = {"dataset._choice": "jsonl", "dataset.path": f"/d/{EVIL[7:]}", "seed": 0}
    for i, path in enumerate(("x", "<i>")):
        settings = evil | {"model.name_or_path": path, "seed": i}
        run(tmp_path / f"<u>{i}", {"kl_data": [3.0, 2.0], "<s>": [1.0, 2.0]}, settings, samples=[sample])
    for folder in (tmp_path, next(tmp_path.glob("*0"))):
        text = write(folder)
        found = Read(text)
        assert found.count("script") == 1 and not {"b", "img", "i", "u", "s"} & {name for name, _ in found.elements}
        assert any("<script>alert(1)</script>&amp;\\x00\\x1b\ufffd" in one for one in found.texts)
        assert not re.search("[\x00-\x08\x0b-\x1f]", text) and drawings(text)
        assert "default-src 'none'" in text


def test_secrets_are_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "tok-0123456789")
    run(tmp_path / "a", {"kl_data": [3.0, 2.0]}, {"dataset.path": "tok-0123456789"})
    assert "tok-0123456789" not in write(tmp_path / "a")


@pytest.mark.parametrize(
    ("curves", "iterations", "words"),
    [
        ({}, 3, "nothing to compare yet"),
        ({"heldout_nll": [2.0]}, 3, "Unfinished: 0 of 3 iterations."),
        (
            {"heldout_nll": [2.0, 1.5, 1.75]},
            4,
            "2.000 at the base to 1.500 at iterate 1, the best, and stands at 1.750",
        ),
        ({"heldout_nll": [2.0, 2.5]}, 1, "no iterate is better than the base (2.000)"),
        (
            {"kl_data": [2.0, 1.5], "heldout_nll": [1.0, 3.0]},
            1,
            "KL from the data went from 2.000 at the base to 1.500",
        ),
        ({"length_mean": [2.0, 1.5]}, 1, "nothing to compare yet"),
    ],
)
def test_any_run_has_a_page(tmp_path: Path, curves: dict[str, list[float]], iterations: int, words: str) -> None:
    root = run(tmp_path / "a", curves, iterations=iterations)
    text = write(root)
    assert words in " ".join(Read(text).texts) and len(drawings(text)) == text.count("<svg ")
    assert ("π" in text) == (iterations > 0 and any(len(values) > 1 for values in curves.values()) or "π₀" in text)


def test_a_run_that_is_judged_by_another_metric(tmp_path: Path, command: Command) -> None:
    root = run(tmp_path / "a", {"kl_data": [2.0, 1.0], "heldout_nll": [1.0, 3.0]})
    assert command("report", str(root), "--metric", "heldout_nll").code == 0
    assert "By Held-out NLL no iterate is better than the base (1.000)" in (root / "report.html").read_text()
    refused = command("report", str(root), "--metric", "margin")
    assert refused.code == 2 and "no side of it is better" in refused.err


def test_benchmarks_stand_in_a_table_each_as_it_was_asked(tmp_path: Path) -> None:
    how = {"task": "t", "task_version": 1, "num_fewshot": 0, "apply_chat_template": False, "items": 9, "lm_eval": "0.4"}
    rows = [{"iterate": k, "eval/t/acc": 0.5 + k / 10, "eval/t/acc_se": 0.05, **how} for k in (0, 1)]
    rows.append(rows[1] | {"num_fewshot": 5, "eval/t/acc": 0.25})
    root = run(tmp_path / "a", {"kl_data": [2.0, 1.0]}, more=rows)
    texts = Read(write(root)).texts
    at = texts.index("t (version 1, 0-shot, n=9)/acc")
    assert texts[at + 1 : at + 5] == ["0.500", "± 0.050", "0.600", "± 0.050"] or "0.500 " in texts[at + 1]
    assert "t (version 1, 5-shot, n=9)/acc" in texts


def test_what_cannot_be_read_is_told_and_the_rest_is_shown(tmp_path: Path, command: Command) -> None:
    for name in ("a", "b"):
        run(tmp_path / name, {"kl_data": [2.0, 1.0]}, {"seed": ord(name)})
    damage(tmp_path / "b/metrics.jsonl")
    result = command("report", str(tmp_path))
    assert result.code == 1 and "b/metrics.jsonl" in result.err and "line 2" in result.err
    assert "Not on this page" in (tmp_path / "report.html").read_text()
    alone = command("report", str(tmp_path / "b"))
    assert alone.code == 1 and not (tmp_path / "b/report.html").exists()


def test_where_the_page_goes_and_what_is_refused(tmp_path: Path, command: Command) -> None:
    for name in ("o/a", "o/b", "p/c"):
        run(tmp_path / name, {"kl_data": [2.0, 1.0]}, {"seed": ord(name[-1])})
    place = {name: str(tmp_path / name) for name in ("o", "o/a", "o/b", "p/c")}
    assert command("report", place["o/a"], place["o/b"]).code == 0 and (tmp_path / "o/report.html").is_file()
    apart = command("report", place["o/a"], place["p/c"])
    assert apart.code == 2 and "--to" in apart.err and not (tmp_path / "report.html").exists()
    told = command("report", place["o/a"], place["p/c"], "--to", str(tmp_path / "x/both.html"))
    assert told.code == 0 and "both.html" in told.out and (tmp_path / "x/both-figures/kl_data.svg").is_file()
    assert 'href="../o/a/report.html"' not in (tmp_path / "x/both.html").read_text()  # it has none of its own yet
    for words in (["x"], [place["o"], "--to", "a.txt"], [], [place["o"], "--what"], [str(tmp_path / "x")]):
        assert command("report", *words).code == 2, words


def test_figures_that_are_no_more_go_and_other_files_stay(tmp_path: Path) -> None:
    root = run(tmp_path / "a", {"kl_data": [2.0, 1.0], "length_mean": [1.0, 2.0]})
    write(root)
    (root / "figures/mine.svg").write_text("<svg/>")
    run(root, {"kl_data": [2.0, 1.0]})
    write(root)
    names = {path.name for path in (root / "figures").iterdir()}
    assert "length_mean.svg" not in names and {"kl_data.svg", "mine.svg"} <= names


def test_png_is_made_where_it_can_be_and_else_refused(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = run(tmp_path / "a", {"kl_data": [2.0, 1.0]}, steps=0)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "resvg_py", None)
        refused = command("report", str(root), "--png")
        assert refused.code == 2 and "spin-reg[figures]" in refused.err and not (root / "report.html").exists()
    pytest.importorskip("resvg_py")
    assert command("report", str(root), "--png").code == 0
    assert (root / "figures/kl_data.png").read_bytes().startswith(b"\x89PNG")
    write(root)  # without PNG: none that may be out of date stays
    assert not list((root / "figures").glob("*.png"))


def test_neither_torch_nor_matplotlib_is_needed(tmp_path: Path) -> None:
    run(tmp_path / "a", {"kl_data": [2.0, 1.0]})
    script = (
        "import sys; sys.modules.update(torch=None, matplotlib=None, transformers=None, numpy=None)\n"
        f"from spin_reg.report import verb; verb.main([{str(tmp_path)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_train_ends_with_a_page_and_its_failure_is_told_and_is_not_the_runs(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", *SMALL, "schedule.iterations=1", f"outputs={tmp_path}", "run_name=r"]

    def broken(*_: object) -> str:
        raise ZeroDivisionError("drawn over nothing")

    with monkeypatch.context() as patch:
        patch.setattr(page, "page", broken)
        result = command(*words)
    assert result.code == 0 and "The report was not written." in result.err and "drawn over nothing" in result.err
    assert "spin-reg report" in result.err and "Traceback" not in result.err
    assert "ZeroDivisionError" in (tmp_path / "r/run.log").read_text()
    assert not (tmp_path / "r/report.html").exists()
    result = command(*words[:-2], "schedule.iterations=2", *words[-2:])
    assert result.code == 0 and f"report   {tmp_path}/r/report.html" in result.err
    text = (tmp_path / "r/report.html").read_text()
    assert "finished" not in " ".join(Read(text).texts[:20]) and text.count('<article class="sample">') == 8
    (tmp_path / "r/report.html").write_text("mine")
    assert command(*words[:-2], "schedule.iterations=2", *words[-2:]).code == 0
    assert (tmp_path / "r/report.html").read_text() == "mine"  # a finished run is left as it is


@pytest.mark.slow
def test_a_sweep_ends_with_a_page_about_all_its_runs(tmp_path: Path, command: Command) -> None:
    words = ["train", "-m", *SMALL, "schedule.iterations=1", f"outputs={tmp_path}", "regularizer=none,kl"]
    result = command(*words)
    assert result.code == 0 and f"report   {tmp_path}/report.html" in result.err
    text = (tmp_path / "report.html").read_text()
    assert "none and kl" in text and len(re.findall(r'href="tiny-toy-[\w.-]+/report\.html"', text)) == 2


@pytest.mark.slow
def test_fifty_runs_take_less_than_three_seconds(tmp_path: Path) -> None:
    for seed in range(5):
        for i in range(10):
            curves = {name: list(RNG.normal(size=6)) for name in ("kl_data", "heldout_nll", "length_mean", "margin")}
            settings = KL | {"regularizer.alpha": [i / 10], "seed": seed}
            run(tmp_path / f"{i}-{seed}", curves, settings, steps=200)
    began = time.process_time()
    text = write(tmp_path)
    assert time.process_time() - began < 3 and len(text) < 4e6


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[browser.Page]:
    program = browser.found()
    if program is None:
        pytest.skip("there is no Chromium on this machine (Debian: apt-get install chromium)")
    with browser.opened(program, tmp_path / "profile") as made:
        yield made


@pytest.mark.slow
def test_a_real_browser_shows_the_page(tmp_path: Path, tab: browser.Page) -> None:
    samples = [{"prompt": "p" * 500, "real": "a b " * 300, "generated": "<script>alert(1)</script>"}]
    sweep(tmp_path / "o")
    run(tmp_path / "o/run-None-0", {"kl_data": [3.5, 3.3, 3.1, 3.2]}, {"seed": 0}, samples=samples)
    folder = tmp_path / "o"
    for root in (folder, folder / "run-None-0"):
        path = verb.report([root]).page
        backs = set()
        for width, dark in ((1320, False), (1320, True), (390, False), (320, True)):
            tab.look(width, 900, dark=dark)
            tab.open(path)
            assert tab.run("document.documentElement.scrollWidth") <= width
            shown = "[...document.querySelectorAll('figure svg')].filter((s) => s.clientWidth > 200).length"
            assert tab.run(shown) == tab.run("document.querySelectorAll('figure svg').length") - 1  # of two sizes one
            backs.add(tab.run("getComputedStyle(document.body).backgroundColor"))
            assert tab.picture().startswith(b"\x89PNG")
        assert len(backs) == 2
        assert set(tab.asked) <= {path.resolve().as_uri(), "data:,"}
        tab.asked.clear()
        assert tab.said == []


@pytest.mark.slow
def test_in_a_real_browser_tables_sort_and_figures_answer(tmp_path: Path, tab: browser.Page) -> None:
    path = verb.report([sweep(tmp_path / "o")]).page
    tab.look(1320, 900)
    tab.open(path)
    column = "[...document.querySelector('table').tBodies[0].rows].map((row) => Number(row.cells[6].dataset.v))"
    head = "document.querySelector('table').tHead.rows[0].cells[6]"
    before = tab.run(column)
    assert before != sorted(before) and len(before) == 4
    for wanted, said in ((sorted(before), "ascending"), (sorted(before, reverse=True), "descending")):
        tab.run(f"{head}.querySelector('button').click()")
        assert tab.run(column) == wanted and tab.run(f"{head}.ariaSort") == said
    names = "[...document.querySelector('table').tBodies[0].rows].map((row) => row.cells[0].textContent.trim())"
    tab.run("document.querySelector('table').tHead.rows[0].cells[0].querySelector('button').click()")
    assert tab.run(names) == ["kl 0.25", "kl 0.5", "kl 1", "none"]
    x, y = tab.run(
        "(() => { const r = document.querySelectorAll('rect.hit')[2].getBoundingClientRect();"
        "return [r.x + r.width / 2, r.y + r.height / 2] })()"
    )
    tab.move(x, y)
    told = tab.run("document.getElementById('tip').textContent")
    assert told.startswith("iterate 2\nnone  3.200 ± 0.141  n = 2") and tab.run(
        "!document.getElementById('tip').hidden"
    )
    tab.move(2, 2)
    assert tab.run("document.getElementById('tip').hidden") and tab.said == []


@pytest.mark.parametrize("words", [["alpha=0.5"], ["train", "alpha=0.5"]])
def test_a_command_is_told_with_its_verb(words: list[str]) -> None:
    """Which the records of older runs do not have."""
    record = {"command": ["/x/spin_reg/__main__.py", *words], "versions": {}, "sources": {}}
    (first, *_) = sheets.provenance([SimpleNamespace(record=record)])  # type: ignore[list-item]
    assert first == ("command", "spin-reg train alpha=0.5")


def test_bases_are_one_number_only_where_they_are_one(tmp_path: Path) -> None:
    for name, base, data in (("a", 3.0, "aaaa"), ("b", 3.0, "aaaa"), ("c", 5.0, "cccc")):
        settings = {"regularizer._choice": "none"} if name == "a" else KL | {"regularizer.alpha": [0.5]}
        run(tmp_path / name, {"kl_data": [base, base - 1]}, settings, data=data)
    assert "The base has 3.000." in write(tmp_path / "a", tmp_path / "b")
    assert "Their bases have 3.000 to 5.000." in write(tmp_path / "a", tmp_path / "b", tmp_path / "c")


def test_runs_on_other_data_are_compared_as_such(tmp_path: Path, command: Command) -> None:
    for seed, data in enumerate(["aaaa", "aaaa", "cccc"]):
        place = {"dataset._choice": "jsonl", "dataset.path": f"{seed}.jsonl", "seed": seed}
        run(tmp_path / f"none{seed}", {"heldout_nll": [3.0, 2.0 + seed]}, place, data=data)
    run(tmp_path / "other", {"heldout_nll": [3.0, 2.0]}, {"dataset._choice": "jsonl", "dataset.path": "x"}, data="cccc")
    both = command("compare", str(tmp_path / "none[01]"), str(tmp_path / "other"), "--samples", "0")
    assert both.code == 0 and "sources.data\taaaa\tcccc" in both.out, both.err
    several = command("compare", str(tmp_path / "none*"), str(tmp_path / "other"))
    assert several.code == 2 and "sources.data: aaaa, cccc" in several.err
    (one,) = [made for made in groups.group(gather.runs([tmp_path / f"none{seed}" for seed in (0, 1)])[0])[0]]
    assert sorted(one.runs) == [0, 1]  # the same data in two places
