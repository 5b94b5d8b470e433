"""Small charts as SVG, to stand inside a page: no script, no font, no file beside it."""

import math
from collections.abc import Mapping, Sequence
from html import escape

__all__ = ["bars", "lines"]

_WIDTH, _HEIGHT = 560, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 14, 30
_COLOURS = ("c1", "c2", "c3", "c4")

Points = Sequence[tuple[float, float]]


def lines(series: Mapping[str, Points], *, x_label: str = "", ticks: Mapping[float, str] | None = None) -> str:
    """Lines over a common axis, with a legend. A series of one point is a dot.

    Args:
        series: points by name, ascending in x.
        x_label: what x is, where the ticks do not say it.
        ticks: labels at x; by default a few round numbers.
    """
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    x_low, x_high = min(xs), max(xs)
    steps = _round_steps(min(ys), max(ys))
    y_low, y_high = steps[0], steps[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        up = (y - y_low) / (y_high - y_low)
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for step in steps:
        _, y = place(x_low, step)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(step)}</text>')
    shown = ticks if ticks is not None else {x: _number(x) for x in _round_steps(x_low, x_high) if x_low <= x <= x_high}
    for at, label in shown.items():
        x, _ = place(at, y_low)
        anchor = "end" if at == x_high > x_low else "middle"
        parts.append(f'<text class="tick" x="{x:.1f}" y="{_HEIGHT - 12}" text-anchor="{anchor}">{escape(label)}</text>')
    for colour, points in zip(_COLOURS, series.values(), strict=False):
        placed = [place(*point) for point in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline class="line {colour}" points="{path}"/>')
        if len(placed) <= _MARKED:
            parts += [f'<circle class="dot {colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in placed]
    parts.append(f'<text class="tick" x="{_WIDTH - _RIGHT}" y="{_HEIGHT}" text-anchor="end">{escape(x_label)}</text>')
    legend = "".join(
        f'<span><i class="key {colour}"></i>{escape(name)}</span>'
        for colour, name in zip(_COLOURS, series, strict=False)
    )
    drawing = "".join(parts)
    picture = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + 4}" role="img">{drawing}</svg>'
    return f'<div class="legend">{legend}</div>{picture}'


_MARKED = 40
"""Series of more points are drawn without dots."""


def bars(values: Mapping[str, float], notes: Mapping[str, str]) -> str:
    """Horizontal bars, one a row, each with what is noted beside it."""
    most = max(values.values(), default=0.0)
    if most <= 0:
        return ""
    rows = []
    for number, (name, value) in enumerate(values.items()):
        y, length = 30 * number, value / most * (_WIDTH - 260)
        rows.append(f'<text class="name" x="98" y="{y + 17}" text-anchor="end">{escape(name)}</text>')
        rows.append(f'<rect class="bar" x="108" y="{y + 4}" width="{max(length, 1.5):.1f}" height="18" rx="3"/>')
        rows.append(f'<text class="name" x="{116 + length:.1f}" y="{y + 17}">{escape(notes[name])}</text>')
    return f'<svg viewBox="0 0 {_WIDTH} {30 * len(values)}" role="img">{"".join(rows)}</svg>'


def _round_steps(low: float, high: float) -> list[float]:
    """Three to seven round numbers from at most `low` to at least `high`."""
    if high - low < 1e-12:
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if high else (0.0, 1.0)
    rough = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _number(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
