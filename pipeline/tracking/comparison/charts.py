"""Small charts as SVG, drawn here so that a page holds them as text: no script, no font, no address."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from pipeline.tracking.comparison.evidence import Points

COLOURS = ("#2563eb", "#d9480f", "#2b8a3e", "#9c36b5", "#0b7285", "#c2255c", "#866118", "#495057")
GOOD, BAD, INK, FAINT, RULE = "#2b8a3e", "#c92a2a", "#212529", "#868e96", "#e9ecef"
LETTER = 6.6  # width of one letter at 12 px, about


@dataclass(frozen=True)
class Row:
    """One group in a chart of values: its runs' values, with the mean and the spread of them."""

    name: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class Series:
    """One group in a chart of curves: those of its runs."""

    name: str
    curves: tuple[Points, ...]


@dataclass(frozen=True)
class Bar:
    """One line of a chart of differences."""

    name: str
    value: float
    note: str = ""


def colour(place: int) -> str:
    """The colour of the group in this place."""
    return COLOURS[place % len(COLOURS)]


def dots(rows: Sequence[Row], label: str, width: int = 860) -> str:
    """Every run as a dot, the mean as a stroke, one standard deviation to each side as a bar."""
    values = [value for row in rows for value in row.values]
    left = _label_width([row.name for row in rows])
    spreads = [float(np.std(row.values, ddof=1)) if len(row.values) > 1 else 0.0 for row in rows]
    means = [float(np.mean(row.values)) for row in rows]
    ends = [mean + sign * std for mean, std in zip(means, spreads, strict=True) for sign in (-1, 1)]
    scale = _Scale(*_margins(min(values + ends), max(values + ends)), left, width - 20)
    height = 34 * len(rows) + 40
    parts = _vertical_axis(scale, height - 34, label, (left + width) / 2)
    for place, (row, mean, std) in enumerate(zip(rows, means, spreads, strict=True)):
        y = 34 * place + 22
        parts.append(_text(left - 10, y + 4, row.name, anchor="end"))
        if std:
            x, end = scale(mean - std), scale(mean + std)
            parts.append(f'<rect x="{x:.1f}" y="{y - 6}" width="{end - x:.1f}" height="12" rx="3" '
                         f'fill="{colour(place)}" opacity="0.18"/>')  # fmt: skip
        parts.append(_line(scale(mean), y - 10, scale(mean), y + 10, colour(place), 3))
        parts += [
            f'<circle cx="{scale(value):.1f}" cy="{y}" r="4" fill="{colour(place)}" opacity="0.65"/>'
            for value in row.values
        ]
    return _svg(width, height, parts)


def curves(series: Sequence[Series], title: str, width: int = 275, height: int = 200) -> str:
    """Every run as a thin line, the mean of each group over the steps that all its runs have as a thick one."""
    points = [point for one in series for curve in one.curves for point in curve if math.isfinite(point[1])]
    if not points:
        return ""
    steps, values = zip(*points, strict=True)
    across = _Scale(min(steps), max(*steps, min(steps) + 1), 48, width - 12)
    up = _Scale(*_margins(min(values), max(values)), height - 34, 30)
    parts = [_text(48, 16, title, weight="600")]
    for tick in ticks(up.low, up.high, 5):
        parts.append(_line(48, up(tick), width - 12, up(tick), RULE))
        parts.append(_text(42, up(tick) + 4, _number(tick), anchor="end", fill=FAINT, size=11))
    for tick in ticks(across.low, across.high, 5):
        if tick == round(tick):
            parts.append(_text(across(tick), height - 16, _number(tick), anchor="middle", fill=FAINT, size=11))
    for place, one in enumerate(series):
        for curve in one.curves:
            parts.append(_path(curve, across, up, colour(place), 1, 0.35 if len(one.curves) > 1 else 1))
        parts.append(_path(_mean_curve(one.curves), across, up, colour(place), 2.5, 1))
    return _svg(width, height, parts)


def bars(rows: Sequence[Bar], label: str, width: int = 860) -> str:
    """Differences to both sides of zero: what was gained to the right, what was lost to the left."""
    if not rows:
        return ""
    largest = max(*(abs(row.value) for row in rows), 1e-9)
    left, height = _label_width([row.name for row in rows]), 22 * len(rows) + 40
    scale = _Scale(-largest * 1.02, largest * 1.02, left, width - 190)
    parts = _vertical_axis(scale, height - 34, label, (left + width - 190) / 2)
    for place, row in enumerate(rows):
        y, x = 22 * place + 8, sorted((scale(0), scale(row.value)))
        parts.append(_text(left - 10, y + 11, row.name, anchor="end"))
        fill = GOOD if row.value > 0 else BAD
        parts.append(f'<rect x="{x[0]:.1f}" y="{y}" width="{x[1] - x[0]:.1f}" height="14" rx="2" fill="{fill}"/>')
        parts.append(_text(width - 180, y + 11, row.note, fill=FAINT, size=11))
    parts.append(_line(scale(0), 0, scale(0), height - 34, INK))
    return _svg(width, height, parts)


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round values between `low` and `high`: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / max(about, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class _Scale:
    """From values `low` to `high` to pixels `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _margins(low: float, high: float) -> tuple[float, float]:
    room = (high - low) * 0.06 or max(abs(low) * 0.01, 1e-3)
    return low - room, high + room


def _mean_curve(curves: Sequence[Points]) -> Points:
    maps = [dict(curve) for curve in curves]
    common = sorted(set.intersection(*(set(each) for each in maps))) if maps else []
    return tuple((step, float(np.mean([each[step] for each in maps]))) for step in common)


def _vertical_axis(scale: _Scale, height: float, label: str, middle: float) -> list[str]:
    """Rules with their values below them, and what they mean."""
    parts = []
    for tick in ticks(scale.low, scale.high, 6):
        parts.append(_line(scale(tick), 4, scale(tick), height, RULE))
        parts.append(_text(scale(tick), height + 14, _number(tick), anchor="middle", fill=FAINT, size=11))
    return [*parts, _text(middle, height + 28, label, anchor="middle", fill=FAINT, size=11)]


def _path(curve: Points, across: _Scale, up: _Scale, stroke: str, width: float, opacity: float) -> str:
    finite = [(step, value) for step, value in curve if math.isfinite(value)]
    if len(finite) == 1:
        return f'<circle cx="{across(finite[0][0]):.1f}" cy="{up(finite[0][1]):.1f}" r="3" fill="{stroke}"/>'
    drawn = " ".join(f"{across(step):.1f},{up(value):.1f}" for step, value in finite)
    return (
        f'<polyline points="{drawn}" fill="none" stroke="{stroke}" stroke-width="{width}" '
        f'stroke-linejoin="round" opacity="{opacity}"/>'
    )


def _line(x: float, y: float, to_x: float, to_y: float, stroke: str, width: float = 1) -> str:
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" stroke="{stroke}" stroke-width="{width}"/>'


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", fill: str = INK, size: int = 12, weight: str = "400"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}" font-size="{size}" '
        f'font-weight="{weight}">{escape(text)}</text>'
    )


def _label_width(names: Sequence[str]) -> float:
    return min(max(map(len, names)) * LETTER + 20, 320)


def _number(value: float) -> str:
    return f"{value:g}"


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img">{"".join(parts)}</svg>'
