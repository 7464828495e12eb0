"""Charts as SVG text: they scale with the page, print sharply, and need neither script nor network.

Colours are from the Okabe-Ito palette, which stays apart under the common kinds of colour
blindness; a marker shape and a dash pattern say the same again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

from markupsafe import Markup, escape

WIDTH = 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 14, 14, 42
_HEIGHT = 264


@dataclass(frozen=True, slots=True)
class Style:
    """How a series looks: stroke colour, marker (circle, square, triangle) and dash pattern."""

    colour: str
    marker: str = "circle"
    dash: str = ""


@dataclass(frozen=True, slots=True)
class Series:
    """A line: points with None for y are left out. ``band`` is (x, low, high), drawn behind all
    lines.
    """

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
    """``0.613`` as ``61.3``: the figures of the page are all out of 100."""
    return f"{100 * value:.1f}"


def percent_tick(value: float) -> str:
    """``0.6`` as ``60``: without decimals that a round number does not need."""
    return f"{100 * value:.6g}"


def marker(style: Style, x: float, y: float, size: float = 4.5) -> Markup:
    """The series' marker at a point."""
    if style.marker == "square":
        shape = f'<rect x="{x - size:.1f}" y="{y - size:.1f}" width="{2 * size:.1f}" height="{2 * size:.1f}"'
    elif style.marker == "triangle":
        shape = (
            f'<path d="M{x:.1f} {y - 1.2 * size:.1f}L{x + 1.1 * size:.1f} {y + 0.8 * size:.1f}'
            f'L{x - 1.1 * size:.1f} {y + 0.8 * size:.1f}Z"'
        )
    else:
        shape = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}"'
    return Markup(f'{shape} fill="{style.colour}" stroke="#fff" stroke-width="1"/>')


def legend_mark(style: Style) -> Markup:
    """A short piece of the series' line with its marker, for a legend in HTML."""
    return (
        Markup(
            f'<svg class="key" viewBox="0 0 34 14" width="34" height="14" aria-hidden="true">'
            f'<line x1="1" y1="7" x2="33" '
            f'y2="7" stroke="{style.colour}" stroke-width="2.2" stroke-dasharray="{style.dash}"/>'
        )
        + marker(style, 17, 7)
        + Markup("</svg>")
    )


def line_chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    description: str,
    show: Callable[[float], str] = percent_tick,
    bounds: tuple[float | None, float | None] = (None, None),
    width: float = WIDTH,
) -> Markup:
    """Lines over steps. ``bounds`` fix an end of the y axis where not None.

    A line of many points is drawn thin with its running mean over ``running_window`` points thick
    above it.
    """
    drawn = [
        Series(s.name, s.style, [(x, y) for x, y in s.points if y is not None], s.band)
        for s in series
    ]
    xs = [x for s in drawn for x, _ in s.points]
    ys = [y for s in drawn for _, y in s.points] + [
        end for s in drawn for _, *ends in s.band for end in ends
    ]
    low, high = (
        (min(ys) if bounds[0] is None else bounds[0]),
        (max(ys) if bounds[1] is None else bounds[1]),
    )
    y_ticks = ticks(low, high)
    low, high = min(low, y_ticks[0]), max(high, y_ticks[-1])
    x_ticks = [
        t
        for t in ticks(min(xs), max(xs), 6 if width > 400 else 4)
        if min(xs) <= t <= max(xs) and t == int(t)
    ]

    def at_x(x: float) -> float:
        return _LEFT + (x - min(xs)) / ((max(xs) - min(xs)) or 1) * (width - _LEFT - _RIGHT)

    def at_y(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - low) / ((high - low) or 1) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in y_ticks:
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{at_y(tick):.1f}" '
            f'y2="{at_y(tick):.1f}"/>' + _text(_LEFT - 8, at_y(tick) + 4, show(tick), "end")
        )
    parts += [_text(at_x(tick), _HEIGHT - _BOTTOM + 18, f"{tick:g}", "middle") for tick in x_ticks]
    parts.append(
        f'<line class="axis" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{at_y(low):.1f}" y2="{at_y(low):.1f}"/>'
    )
    parts.append(_text((_LEFT + width - _RIGHT) / 2, _HEIGHT - 5, x_label, "middle", "label"))
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(
        f'<text class="label" text-anchor="middle" transform="translate(13 {middle:.0f}) rotate(-90)">'
        f"{escape(y_label)}</text>"
    )
    for s in (line for line in drawn if line.band):
        edge = [(at_x(x), at_y(top)) for x, _, top in s.band] + [
            (at_x(x), at_y(b)) for x, b, _ in reversed(s.band)
        ]
        parts.append(
            f'<path d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in edge)}Z" fill="{s.style.colour}" '
            'opacity=".14"/>'
        )
    for index, s in reversed(list(enumerate(drawn))):  # the first series ends up on top
        window = running_window(len(s.points))
        means = running_mean([y for _, y in s.points], window)
        places = [(at_x(x), at_y(mean)) for (x, _), mean in zip(s.points, means)]
        if window > 1:
            raw = [(at_x(x), at_y(y)) for x, y in s.points]
            parts.append(_path(raw, s.style.colour, 'stroke-width="1" opacity=".35"'))
        parts.append(
            _path(places, s.style.colour, f'stroke-width="2.4" stroke-dasharray="{s.style.dash}"')
        )
        every = max(1, len(places) // 5) if window > 1 else 1
        first = index * every // 2 % every  # lines that coincide show their markers in turn
        parts += [str(marker(s.style, x, y)) for x, y in places[first::every]]
    return _svg(parts, width, _HEIGHT, description)


def interval_chart(
    bars: Sequence[Bar],
    axis_label: str,
    description: str,
    bounds: tuple[float | None, float | None] = (None, None),
) -> Markup:
    """One row per bar: the name above a whisker from low to high with the marker at the value."""
    ends = [end for b in bars for end in (b.value, b.low, b.high) if end is not None]
    low, high = (
        (min(ends) if bounds[0] is None else bounds[0]),
        (max(ends) if bounds[1] is None else bounds[1]),
    )
    marks = ticks(low, high)
    low, high = min(low, marks[0]), max(high, marks[-1])
    row, left, right = 50, 14, 24
    height = row * len(bars) + 46

    def at(value: float) -> float:
        return left + (value - low) / ((high - low) or 1) * (WIDTH - left - right)

    bottom = row * len(bars) + 6
    parts = [
        f'<line class="grid" x1="{at(t):.1f}" x2="{at(t):.1f}" y1="4" y2="{bottom}"/>'
        + _text(at(t), bottom + 16, percent_tick(t), "middle")
        for t in marks
    ]
    parts.append(_text((WIDTH + left - right) / 2, height - 5, axis_label, "middle", "label"))
    for index, b in enumerate(bars):
        y = row * index + 36
        figure = percent(b.value) + (
            "" if b.low is None else f"  [{percent(b.low)}, {percent(b.high)}]"
        )
        parts.append(
            f'<rect x="{left - 2}" y="{y - 29}" width="{WIDTH - left - right + 4}" height="19" fill="#fff"/>'
        )
        parts.append(_text(left, y - 15, b.name, "start", "name"))
        parts.append(_text(WIDTH - right, y - 15, figure, "end", "value"))
        if b.low is not None:
            parts.append(
                f'<line x1="{at(b.low):.1f}" x2="{at(b.high):.1f}" y1="{y}" y2="{y}" '
                f'stroke="{b.style.colour}" stroke-width="3.5" stroke-linecap="round" opacity=".5"/>'
            )
        parts.append(str(marker(b.style, at(b.value), y, 6.5)))
    return _svg(parts, WIDTH, height, description)


def running_window(count: int) -> int:
    """Points to average for a line of ``count`` points: 1 for short lines, about a tenth of them
    for long ones.
    """
    return 1 if count <= 25 else max(3, count // 10) | 1


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Centred mean over ``window`` (odd) points; at the ends over those of them that exist."""
    reach = window // 2
    parts = [values[max(0, index - reach) : index + reach + 1] for index in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers whose steps are 1, 2, 2.5 or 5 times a power of ten and that span low to high."""
    if high <= low:
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    raw = (high - low) / about
    power = 10.0 ** floor(log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def _text(x: float, y: float, text: str, anchor: str, css: str = "tick") -> str:
    return (
        f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _path(places: Sequence[tuple[float, float]], colour: str, attributes: str) -> str:
    return (
        f'<path d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in places)}" fill="none" stroke="{colour}" '
        f'stroke-linejoin="round" {attributes}/>'
    )


def _svg(parts: Sequence[str], width: float, height: float, description: str) -> Markup:
    return Markup(
        f'<svg class="chart" viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(description)}">'
        f"{''.join(parts)}</svg>"
    )
