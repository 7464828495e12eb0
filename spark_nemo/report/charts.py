"""Charts as SVG text: they scale with the page, print sharply and need no script or network.

Colours are from the Okabe-Ito palette, which stays distinct under the common kinds of colour
blindness; marker shapes and dash patterns repeat the distinction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

from markupsafe import Markup, escape

WIDTH = 460
_HEIGHT = 264
_LEFT = 64
_RIGHT = 14
_TOP = 14
_BOTTOM = 42

Bounds = tuple[float | None, float | None]
"""Fixed ends of an axis; None takes the end from the data."""


@dataclass(frozen=True, slots=True)
class Style:
    """Appearance of a series: stroke colour, marker (circle, square, triangle) and dash pattern."""

    colour: str
    marker: str = "circle"
    dash: str = ""


@dataclass(frozen=True, slots=True)
class Series:
    """A line; points whose y is None are left out. ``band`` is (x, low, high), behind all lines."""

    name: str
    style: Style
    points: Sequence[tuple[float, float | None]]
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True, slots=True)
class Bar:
    """A value with its interval, one row of an interval chart."""

    name: str
    style: Style
    value: float
    low: float | None = None
    high: float | None = None


def percent(value: float) -> str:
    """Write ``0.613`` as ``61.3``; all figures of the page are out of 100."""
    return f"{100 * value:.1f}"


def percent_tick(value: float) -> str:
    """Write ``0.6`` as ``60``, without decimals that a round number does not need."""
    return f"{100 * value:.6g}"


def marker(style: Style, x: float, y: float, size: float = 4.5) -> Markup:
    """Draw a style's marker at a point."""
    if style.marker == "square":
        side = 2 * size
        shape = (
            f'<rect x="{x - size:.1f}" y="{y - size:.1f}" width="{side:.1f}" height="{side:.1f}"'
        )
    elif style.marker == "triangle":
        shape = (
            f'<path d="M{x:.1f} {y - 1.2 * size:.1f}L{x + 1.1 * size:.1f} {y + 0.8 * size:.1f}'
            f'L{x - 1.1 * size:.1f} {y + 0.8 * size:.1f}Z"'
        )
    else:
        shape = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}"'
    return Markup(f'{shape} fill="{style.colour}" stroke="#fff" stroke-width="1"/>')


def legend_mark(style: Style) -> Markup:
    """Draw a short piece of a series' line with its marker, for a legend in HTML."""
    line = Markup(
        '<svg class="key" viewBox="0 0 34 14" width="34" height="14" aria-hidden="true">'
        f'<line x1="1" y1="7" x2="33" y2="7" stroke="{style.colour}" stroke-width="2.2" '
        f'stroke-dasharray="{style.dash}"/>'
    )
    return line + marker(style, 17, 7) + Markup("</svg>")


def line_chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    description: str,
    show: Callable[[float], str] = percent_tick,
    bounds: Bounds = (None, None),
    width: float = WIDTH,
) -> Markup:
    """Draw lines over steps; ``bounds`` are of the y axis.

    A line of many points is drawn thin, with its running mean thick above it.
    """
    drawn = []
    for line in series:
        points = [(x, y) for x, y in line.points if y is not None]
        drawn.append(Series(line.name, line.style, points, line.band))
    xs = [x for line in drawn for x, _ in line.points]
    ys = [y for line in drawn for _, y in line.points]
    for line in drawn:
        for _, band_low, band_high in line.band:
            ys += [band_low, band_high]
    low = min(ys) if bounds[0] is None else bounds[0]
    high = max(ys) if bounds[1] is None else bounds[1]
    y_ticks = ticks(low, high)
    low = min(low, y_ticks[0])
    high = max(high, y_ticks[-1])
    first_x = min(xs)
    last_x = max(xs)

    def at_x(x: float) -> float:
        return _LEFT + (x - first_x) / ((last_x - first_x) or 1) * (width - _LEFT - _RIGHT)

    def at_y(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - low) / ((high - low) or 1) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in y_ticks:
        y = at_y(tick)
        parts.append(_horizontal_line("grid", y, width))
        parts.append(_text(_LEFT - 8, y + 4, show(tick), "end"))
    for tick in ticks(first_x, last_x, 6 if width > 400 else 4):
        # Steps are whole numbers.
        if first_x <= tick <= last_x and tick == int(tick):
            parts.append(_text(at_x(tick), _HEIGHT - _BOTTOM + 18, f"{tick:g}", "middle"))
    parts.append(_horizontal_line("axis", at_y(low), width))
    parts.append(_text((_LEFT + width - _RIGHT) / 2, _HEIGHT - 5, x_label, "middle", "label"))
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(
        '<text class="label" text-anchor="middle" '
        f'transform="translate(13 {middle:.0f}) rotate(-90)">{escape(y_label)}</text>'
    )
    for line in drawn:
        if line.band:
            edge = [(at_x(x), at_y(top)) for x, _, top in line.band]
            edge += [(at_x(x), at_y(bottom)) for x, bottom, _ in reversed(line.band)]
            parts.append(
                f'<path d="{_path_data(edge)}Z" fill="{line.style.colour}" opacity=".14"/>'
            )
    # Reversed, so that the first series is drawn on top.
    for index, line in reversed(list(enumerate(drawn))):
        points = [(at_x(x), at_y(y)) for x, y in line.points]
        window = running_window(len(points))
        markers_every = 1
        if window > 1:
            parts.append(_path(points, line.style.colour, 'stroke-width="1" opacity=".35"'))
            means = running_mean([y for _, y in line.points], window)
            points = [(at_x(x), at_y(mean)) for (x, _), mean in zip(line.points, means)]
            markers_every = max(1, len(points) // 5)
        thick = f'stroke-width="2.4" stroke-dasharray="{line.style.dash}"'
        parts.append(_path(points, line.style.colour, thick))
        # An offset by series, so that lines which coincide show their markers in turn.
        first_marker = index * markers_every // 2 % markers_every
        for x, y in points[first_marker::markers_every]:
            parts.append(str(marker(line.style, x, y)))
    return _svg(parts, width, _HEIGHT, description)


def interval_chart(
    bars: Sequence[Bar], axis_label: str, description: str, bounds: Bounds = (None, None)
) -> Markup:
    """Draw one row per bar: its name above a whisker with a marker at the value."""
    ends = [end for bar in bars for end in (bar.value, bar.low, bar.high) if end is not None]
    low = min(ends) if bounds[0] is None else bounds[0]
    high = max(ends) if bounds[1] is None else bounds[1]
    x_ticks = ticks(low, high)
    low = min(low, x_ticks[0])
    high = max(high, x_ticks[-1])
    row = 50
    left = 14
    right = 24
    height = row * len(bars) + 46
    bottom = row * len(bars) + 6

    def at_x(value: float) -> float:
        return left + (value - low) / ((high - low) or 1) * (WIDTH - left - right)

    parts = []
    for tick in x_ticks:
        x = f"{at_x(tick):.1f}"
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="4" y2="{bottom}"/>')
        parts.append(_text(at_x(tick), bottom + 16, percent_tick(tick), "middle"))
    parts.append(_text((WIDTH + left - right) / 2, height - 5, axis_label, "middle", "label"))
    for index, bar in enumerate(bars):
        y = row * index + 36
        figure = percent(bar.value)
        if bar.low is not None:
            figure += f"  [{percent(bar.low)}, {percent(bar.high)}]"
        # White behind the texts, over the grid.
        parts.append(
            f'<rect x="{left - 2}" y="{y - 29}" width="{WIDTH - left - right + 4}" height="19" '
            'fill="#fff"/>'
        )
        parts.append(_text(left, y - 15, bar.name, "start", "name"))
        parts.append(_text(WIDTH - right, y - 15, figure, "end", "value"))
        if bar.low is not None:
            parts.append(
                f'<line x1="{at_x(bar.low):.1f}" x2="{at_x(bar.high):.1f}" y1="{y}" y2="{y}" '
                f'stroke="{bar.style.colour}" stroke-width="3.5" stroke-linecap="round" '
                'opacity=".5"/>'
            )
        parts.append(str(marker(bar.style, at_x(bar.value), y, 6.5)))
    return _svg(parts, WIDTH, height, description)


def running_window(count: int) -> int:
    """Return how many of ``count`` points to average: 1 for short lines, else about a tenth."""
    return 1 if count <= 25 else max(3, count // 10) | 1


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the centred mean over ``window`` (odd) points, over fewer at the ends."""
    reach = window // 2
    means = []
    for index in range(len(values)):
        part = values[max(0, index - reach) : index + reach + 1]
        means.append(sum(part) / len(part))
    return means


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers that span low to high; steps are 1, 2, 2.5 or 5 times 10^k."""
    if high <= low:
        low -= abs(low) * 0.1 or 0.5
        high += abs(high) * 0.1 or 0.5
    raw_step = (high - low) / about
    power = 10.0 ** floor(log10(raw_step))
    steps = [factor * power for factor in (1, 2, 2.5, 5, 10)]
    step = next(step for step in steps if step >= raw_step * 0.999)
    first = floor(low / step + 1e-9)
    last = ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def _text(x: float, y: float, text: str, anchor: str, css: str = "tick") -> str:
    return (
        f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _horizontal_line(css: str, y: float, width: float) -> str:
    return f'<line class="{css}" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _path_data(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _path(points: Sequence[tuple[float, float]], colour: str, attributes: str) -> str:
    return (
        f'<path d="{_path_data(points)}" fill="none" stroke="{colour}" '
        f'stroke-linejoin="round" {attributes}/>'
    )


def _svg(parts: Sequence[str], width: float, height: float, description: str) -> Markup:
    return Markup(
        f'<svg class="chart" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape(description)}">{"".join(parts)}</svg>'
    )
