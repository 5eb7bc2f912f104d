"""Colours, dashes and markers: one hue a regularizer, darker (on dark paper: lighter) for each further variant."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

PAPER = {"paper": ("#fdfcf9", "#16181b"), "wash": ("#f5f2ec", "#1e2125"), "ink": ("#22211f", "#e9e6df")}
PAPER |= {"soft": ("#625f59", "#aaa69d"), "rule": ("#e3dfd6", "#33373c"), "axis": ("#aaa59b", "#6d6f72")}
PAPER |= {"high": ("#1f6fb2", "#4f9ede"), "low": ("#c2500f", "#e58a4a")}  # of the heat map
HUES = {  # on light and on dark paper; each is read as text, so it keeps a contrast of 4.5
    "none": ("#5c5a55", "#bdb9b0"),
    "kl": ("#1b69ab", "#6fb4f0"),
    "fictitious_play": ("#b5470f", "#f79a5f"),
    "mixture_of_two": ("#0f7358", "#52cfa9"),
    "base": ("#8b479c", "#d09ade"),
}
MORE = (("#846500", "#dcbc4c"), ("#ad2f57", "#fb93b1"), ("#33707c", "#7fc6d5"))
MARKERS = ("circle", "square", "diamond", "up", "down")
DASHES = (None, "6 3", "2 2.5", "8 3 2 3", "12 3")
SHADE = 0.5  # how far toward black or white the last variant goes
SERIF = "'Iowan Old Style', 'Palatino Linotype', Palatino, P052, 'URW Palladio L', 'Book Antiqua', Georgia, serif"
SANS = "Inter, system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


@dataclass(frozen=True)
class Ink:
    """How one group is drawn; `colour` is a CSS variable, its two values are in `light` and `dark`."""

    colour: str
    light: str
    dark: str
    marker: str
    dash: str | None


def inks(regularizers: Sequence[str]) -> list[Ink]:
    """An ink for each group, given their regularizers in order."""
    others = [kind for kind in dict.fromkeys(regularizers) if kind not in HUES]
    kinds = [*HUES, *others]
    made = []
    for i, kind in enumerate(regularizers):
        light, dark = HUES[kind] if kind in HUES else MORE[others.index(kind) % len(MORE)]
        variant, variants = regularizers[:i].count(kind), regularizers.count(kind)
        toward = SHADE * variant / max(1, variants - 1)
        marker, dash = MARKERS[kinds.index(kind) % len(MARKERS)], DASHES[variant % len(DASHES)]
        made.append(Ink(f"var(--s{i})", mix(light, "#000000", toward), mix(dark, "#ffffff", toward), marker, dash))
    return made


def mix(colour: str, other: str, share: float) -> str:
    """`share` of the other colour, in sRGB."""
    parts = zip(bytes.fromhex(colour[1:]), bytes.fromhex(other[1:]), strict=True)
    return "#" + bytes(round(a + (b - a) * share) for a, b in parts).hex()


def variables(inks: Sequence[Ink], *, dark: bool) -> dict[str, str]:
    """The values of all CSS variables that drawings use."""
    found = {name: pair[dark] for name, pair in PAPER.items()} | {"sans": SANS, "serif": SERIF}
    return found | {f"s{i}": ink.dark if dark else ink.light for i, ink in enumerate(inks)}


def resolved(drawing: str, inks: Sequence[Ink]) -> str:
    """A drawing that stands alone: on light paper, with colours and fonts in place of variables."""
    values = variables(inks, dark=False)
    return re.sub(r"var\(--(\w+)\)", lambda found: values[found[1]].replace('"', "'"), drawing)
