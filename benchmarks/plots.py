"""Line plots as SVG, both axes logarithmic: enough for figures that range over sizes, and readable as text."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import NamedTuple

_WIDTH, _HEIGHT = 760, 380
_FONT = 'font-family="sans-serif" font-size="12"'
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 250, 36, 44
_COLOURS = ("#0b6e4f", "#c1121f", "#f4a261", "#33658a", "#7a7a7a")

Series = Mapping[str, Sequence[tuple[float, float]]]


class Plot(NamedTuple):
    """What is drawn: points by the name of their line. `spell` writes a value of the y axis."""

    title: str
    x: str
    series: Series
    spell: Callable[[float], str]


def svg(plot: Plot) -> str:
    """The picture; of no points at all an empty one."""
    points = [point for line in plot.series.values() for point in line if min(point) > 0]
    if not points:
        return f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}"/>\n'
    across = _scale([x for x, _ in points], _LEFT, _WIDTH - _RIGHT, pad=0.06)
    up = _scale([y for _, y in points], _HEIGHT - _BOTTOM, _TOP, pad=0.05)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" {_FONT}>',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="20" font-size="14" font-weight="bold">{escape(plot.title)}</text>',
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2:.0f}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(plot.x)}</text>',
    ]
    for x in sorted({x for x, _ in points}):
        parts.append(f'<text x="{across(x):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{_count(x)}</text>')
    for y in _ticks([y for _, y in points]):
        at = up(y)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#e0e0e0"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{escape(plot.spell(y))}</text>')
    for number, (name, line) in enumerate(plot.series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        drawn = [(across(x), up(y)) for x, y in sorted(line) if min(x, y) > 0]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in drawn]
        at = _TOP + 10 + 20 * number
        parts.append(f'<circle cx="{_WIDTH - _RIGHT + 16}" cy="{at - 4}" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{_WIDTH - _RIGHT + 28}" y="{at}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _scale(values: Sequence[float], start: float, end: float, *, pad: float) -> Callable[[float], float]:
    """Value to pixel."""
    low, high = math.log10(min(values)), math.log10(max(values))
    if high - low < 0.3:
        low, high = low - 0.3, high + 0.3
    margin = (high - low) * pad
    low, high = low - margin, high + margin
    return lambda value: start + (math.log10(value) - low) / (high - low) * (end - start)


def _ticks(values: Sequence[float]) -> list[float]:
    """Powers of ten, and 2 and 5 of them where there is room."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    steps = (1,) if high - low > 3 else (1, 2, 5)
    near, far = min(values) / 1.3, max(values) * 1.3
    return [y for power in range(low, high + 1) for step in steps if near <= (y := step * 10.0**power) <= far]


def _count(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 10_000 else f"{value:,.0f}"
