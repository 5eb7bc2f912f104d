"""SVG as text: elements, scales and round tick values. Colours and fonts are CSS variables, `var(--name)`, so that one
drawing serves a light and a dark page; `ink.resolved` puts values in their place.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), 127) if code not in (9, 10)}
BROKEN = re.compile("[\ud800-\udfff\ufffe\uffff]")  # what XML and UTF-8 cannot hold
Attributes = dict[str, str | float | None]
CHAR = 0.56  # width of a character against the size of the font, on the wide side for a sans


def visible(text: str) -> str:
    """Control characters by their codes, as \\x14, and no character that cannot be written down."""
    return BROKEN.sub("\ufffd", text.translate(CONTROLS))


def tag(name: str, *inside: str, **attributes: str | float | None) -> str:
    """An element; None leaves an attribute out, `stroke_width` is stroke-width, `class_` is class."""
    words = [name]
    for key, value in attributes.items():
        if value is not None:
            shown = coordinate(value) if isinstance(value, float | int) else escape(visible(value))
            words.append(f'{key.rstrip("_").replace("_", "-")}="{shown}"')
    return f"<{' '.join(words)}>{''.join(inside)}</{name}>" if inside else f"<{' '.join(words)}/>"


def text(words: str, x: float, y: float, **attributes: str | float | None) -> str:
    """Words at a place, escaped."""
    return tag("text", escape(visible(words)), x=x, y=y, **attributes)


def coordinate(value: float) -> str:
    """Two decimals are enough for a pixel."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def path(points: Sequence[tuple[float, float]], *, close: bool = False) -> str:
    """The `d` of straight lines through points."""
    return "M" + "L".join(f"{coordinate(x)} {coordinate(y)}" for x, y in points) + ("Z" if close else "")


def wide(words: str, size: float) -> float:
    """About how wide words are, in pixels: fonts differ, so leave some room."""
    return len(words) * size * CHAR


@dataclass(frozen=True)
class Scale:
    """The straight line that takes `low` to `start` and `high` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def extent(values: Sequence[float], margin: float = 0.06) -> tuple[float, float]:
    """The range of the values and a margin on either side. All-equal values get a range around them."""
    low, high = min(values), max(values)
    width = high - low or abs(high) * 0.1 or 1.0
    return low - margin * width, high + margin * width


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten inside the range, no more than `most`."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    for factor in (1, 2, 5, 10, 20):
        step = factor * power
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= most:
            return [round(i * step, 12) for i in range(first, last + 1)]
    raise AssertionError("one of the steps is large enough")


def decimals(values: Sequence[float]) -> int:
    """How many decimals tell these ticks apart."""
    return next((n for n in range(8) if all(abs(v - round(v, n)) < 1e-9 * max(1.0, abs(v)) for v in values)), 8)


def number(value: float, places: int | None = None) -> str:
    """A value with a real minus sign: three decimals of small ones, fewer of large ones, as in the command's table."""
    if places is None:
        places = max(0, 3 - max(0, len(str(int(abs(value)))) - 1))
    shown = f"{value:.{places}f}"
    zero = not shown.strip("-0.")
    return shown.lstrip("-") if zero else shown.replace("-", "−")
