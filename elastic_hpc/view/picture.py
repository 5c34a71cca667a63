"""A job as a picture: world size, steps and loss over time, and where the nodes' time went; as SVG. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest

from markupsafe import escape

from elastic_hpc.membership.policy import FINISHED
from elastic_hpc.view.account import MEANINGS, Kind, Phase, account_of, phases
from elastic_hpc.view.story import Round, Sample, Story
from elastic_hpc.view.times import span

WIDTH = 1100
_LEFT, _RIGHT = 64, 20
_STRIP = 6
"""Height of the strip below the axis of the nodes that shows the time in the queue."""
_COLOURS: dict[Kind, str] = {
    "kept": "#2f855a",
    "repeated": "#dd6b20",
    "unreported": "#3182ce",
    "start": "#a0aec0",
    "workers": "#63b3ed",
    "stopping": "#b794f4",
    "forming": "#6b46c1",
    "idle": "#e2e8f0",
    "queue": "#ecc94b",
}
STYLE = (
    "text{font-family:'DejaVu Sans',Verdana,Helvetica,Arial,sans-serif;font-size:12px;fill:#2d3748}"
    ".title{font-weight:bold}.small{font-size:11px}.grid{stroke:#cbd5e0;stroke-width:1}"
    ".allocated{fill:none;stroke:#4a5568;stroke-width:1.5;stroke-dasharray:5 3}"
    ".fault{stroke:#c53030;stroke-width:1.5;fill:#c53030}.faulttext{fill:#c53030}"
    ".change{stroke:#b7791f;stroke-width:1.5;fill:#b7791f}.changetext{fill:#975a16}"
    ".done{stroke:#2f855a;stroke-width:1.5;fill:#2f855a}.donetext{fill:#2f855a}"
    ".line{fill:none;stroke:#2f855a;stroke-width:2}.again{fill:none;stroke:#dd6b20;stroke-width:2}"
    ".loss{fill:none;stroke:#3182ce;stroke-width:1.5}"
    + "".join(f".{kind}{{fill:{colour}}}" for kind, colour in _COLOURS.items())
)
"""The style of the picture's classes, on a light background."""

_STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 10800, 21600, 43200, 86400)


@dataclass(frozen=True)
class _Scale:
    """Maps a range of values to a range of pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low or 1.0)
        return round(self.start + share * (self.end - self.start), 1)


def draw(story: Story, now: float | None = None) -> str:
    """The picture as one SVG element, without its style; see ``account.account`` for ``now``."""
    shown = phases(story, now)
    if not shown:
        return f'<svg viewBox="0 0 {WIDTH} 40"><text x="8" y="24">no run is on record</text></svg>'
    time = _Scale(shown[0].start, max(phase.end for phase in shown), _LEFT, WIDTH - _RIGHT)
    parts, top = [], 0
    for panel in (_world, _progress, _losses):
        drawn, height = panel(story, shown, time, top)
        parts.extend(drawn)
        top += height
    drawn, height = _spent(story, shown, top)
    parts.extend(drawn)
    return f'<svg viewBox="0 0 {WIDTH} {top + height}" role="img" xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def _rect(x: float, y: float, width: float, height: float, kind: str, title: str) -> str:
    return (
        f'<rect x="{x}" y="{y}" width="{max(0.5, round(width, 1))}" height="{round(height, 1)}" class="{kind}">'
        f"<title>{escape(title)}</title></rect>"
    )


def _path(points: Iterable[tuple[float, float]], kind: str) -> str:
    return f'<polyline class="{kind}" points="{" ".join(f"{x},{y}" for x, y in points)}"/>'


def _time_axis(time: _Scale, y: float, top: float) -> Iterator[str]:
    length = time.high - time.low
    step = next((step for step in _STEPS if length / step <= 10), 86400 * max(1, round(length / 864000)))
    for number in range(int(length / step) + 1):
        x = time(time.low + number * step)
        yield f'<line class="grid" x1="{x}" x2="{x}" y1="{top}" y2="{y}" opacity="0.5"/>'
        if x < WIDTH - 40:
            yield _text(x, y + 18, span(number * step) if number else "0", "small", "middle")


def _value_axis(scale: _Scale, ticks: Sequence[float], format_spec: str) -> Iterator[str]:
    for tick in ticks:
        y = scale(tick)
        yield f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y}" y2="{y}" opacity="0.5"/>'
        yield _text(_LEFT - 6, y + 4, format(tick, format_spec), "small", "end")


def _even(low: float, high: float, most: int, least: float = 0.0) -> list[float]:
    """About ``most`` round numbers from low to high, at least ``least`` apart."""
    apart = max(least, (high - low) / most) or 1.0
    power = 10 ** math.floor(math.log10(apart))
    size = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= apart * 0.999)
    return [number * size for number in range(math.ceil(low / size), math.floor(high / size + 0.001) + 1)]


def _world(story: Story, shown: Sequence[Phase], time: _Scale, top: int) -> tuple[list[str], int]:
    height, head = 190, 64
    base = top + head + height
    held = _allocation(story, shown)
    most = max([count for _, count in held] + [len(round.nodes) for round in story.rounds] + [1])
    nodes = _Scale(0, most, base, top + head)
    parts = [
        _text(_LEFT, top + 16, "nodes in the world", "title"),
        _text(_LEFT + 150, top + 16, "dashed: nodes that the job held", "small"),
    ]
    parts.extend(_time_axis(time, base, top + head))
    parts.extend(_value_axis(nodes, _even(0, most, 5, least=1), ".0f"))
    for phase in shown:
        count = len(phase.round.nodes) if phase.round else phase.run.granted
        x = time(phase.start)
        y, tall = (base, _STRIP) if phase.kind == "queue" else (nodes(count), base - nodes(count))
        where = f"round {phase.round.number}: " if phase.round else ""
        title = f"{where}{MEANINGS[phase.kind]}, {span(phase.seconds)}"
        parts.append(_rect(x, y, time(phase.end) - x, tall, phase.kind, title))
    corners = [(time(when), nodes(count)) for when, count in held]
    parts.append(
        _path(
            [p for (x, y), (z, _) in zip(corners, [*corners[1:], corners[-1]], strict=True) for p in ((x, y), (z, y))],
            "allocated",
        )
    )
    parts.extend(_marks(story, time, top + head, base))
    return parts, head + height + 34


def _allocation(story: Story, shown: Sequence[Phase]) -> list[tuple[float, int]]:
    """The changes of the number of nodes that the job held: when, and the number from then on."""
    changes: list[tuple[float, int]] = []
    for run in story.runs:
        mine = [phase for phase in shown if phase.run is run and phase.kind != "queue"]
        if mine:
            changes += [(mine[0].start, run.granted), (mine[-1].end, -run.granted)]
    for node in story.joiners:
        changes += [(node.joined, 1), (shown[-1].end if node.left is None else node.left, -1)]
    held, count = [(shown[0].start, 0)], 0
    for when, change in sorted(changes):
        count += change
        held.append((when, count))
    return held


def _marks(story: Story, time: _Scale, top: int, base: int) -> Iterator[str]:
    """Marks for what ended the rounds: one line each, with a label if there is room."""
    free = [float("-inf")] * 3
    for round, following in zip_longest(story.rounds, story.rounds[1:]):
        if round.ended is None:
            continue
        when = round.broken or round.ended
        x, kind = time(when), "fault" if round.faults else "done" if round.cause == FINISHED else "change"
        label = _label(round)
        title = f"end of round {round.number}: {round.cause}"
        title += f"; the next one {following.in_place}" if following and following.in_place else ""
        yield (
            f'<g class="{kind}"><title>{escape(title)}</title>'
            f'<line x1="{x}" x2="{x}" y1="{top - 6}" y2="{base}"/><circle cx="{x}" cy="{top - 6}" r="3.5"/></g>'
        )
        width = 6.6 * len(label) + 8
        begin = min(x, WIDTH - _RIGHT - width)
        row = next((row for row, end in enumerate(free) if end < begin), None)
        if row is not None:
            free[row] = begin + width
            yield _text(begin, top - 14 - 13 * row, label, f"small {kind}text")


def _label(round: Round) -> str:
    if round.faults:
        fault = round.faults[0]
        return f"{fault.node} lost" if fault.rank is None else f"rank {fault.rank} on {fault.node}"
    return round.cause if len(round.cause) < 30 else round.cause[:28] + "..."


def _visible(samples: Sequence[Sample], time: _Scale) -> Sequence[Sample]:
    """As many of ``samples``, with the first and the last, as the picture has room for."""
    if not samples:
        return samples
    room = 2 + time(samples[-1].time) - time(samples[0].time)
    return [*samples[: -1 : math.ceil(len(samples) / room)], samples[-1]]


def _progress(story: Story, _shown: Sequence[Phase], time: _Scale, top: int) -> tuple[list[str], int]:
    steps = [round.last for round in story.rounds if round.last is not None]
    if not steps:
        return [], 0
    height, head = 140, 28
    base = top + head + height
    value = _Scale(0, max(steps), base, top + head)
    parts = [_text(_LEFT, top + 16, "steps", "title"), _text(_LEFT + 50, top + 16, "orange: repeated later", "small")]
    parts.extend(_time_axis(time, base, top + head))
    parts.extend(_value_axis(value, _even(0, max(steps), 4, least=1), ".0f"))
    for round in story.rounds:
        if round.first is None:
            continue
        points = [(time(sample.time), sample.step) for sample in _visible(round.samples, time)]
        turn = round.first + story.kept(round) - 1
        between = next((pair for pair in pairwise(points) if pair[0][1] < turn < pair[1][1]), None)
        if between:
            points.insert(
                points.index(between[1]),
                (_Scale(between[0][1], between[1][1], between[0][0], between[1][0])(turn), turn),
            )
        kept = [(x, value(step)) for x, step in points if step <= turn]
        again = [(x, value(step)) for x, step in points if step > turn]
        if again:
            parts.append(_path([*kept[-1:], *again], "again"))
        if kept:
            parts.append(_path(kept, "line"))
    return parts, head + height + 34


def _losses(story: Story, _shown: Sequence[Phase], time: _Scale, top: int) -> tuple[list[str], int]:
    curves = [_visible([s for s in round.samples if s.loss is not None], time) for round in story.rounds]
    losses = [sample.loss or 0.0 for curve in curves for sample in curve]
    if not losses:
        return [], 0
    height, head = 90, 28
    base = top + head + height
    value = _Scale(min(0.0, *losses), max(losses) or 1.0, base, top + head)
    parts = [_text(_LEFT, top + 16, "loss", "title")]
    parts.extend(_time_axis(time, base, top + head))
    parts.extend(_value_axis(value, _even(value.low, value.high, 3), ".3g"))
    parts.extend(_path([(time(s.time), value(s.loss or 0.0)) for s in curve], "loss") for curve in curves if curve)
    return parts, head + height + 34


def _spent(story: Story, shown: Sequence[Phase], top: int) -> tuple[list[str], int]:
    counted = account_of(story, shown)
    if not counted.total:
        return [], 0
    goodput = "" if counted.goodput is None else f": goodput {counted.goodput:.0%}"
    parts = [_text(_LEFT, top + 16, f"where the nodes' time went{goodput}", "title")]
    scale, at = _Scale(0, counted.total, _LEFT, WIDTH - _RIGHT), 0.0
    column = row = 0
    for kind, meaning in MEANINGS.items():
        spent = counted.node_seconds.get(kind, 0.0)
        if not spent:
            continue
        title = f"{meaning}: {spent / counted.total:.1%}, {span(spent)} of one node"
        parts.append(_rect(scale(at), top + 26, scale(at + spent) - scale(at), 26, kind, title))
        at += spent
        x, y = _LEFT + 520 * column, top + 76 + 18 * row
        parts.append(_rect(x, y - 10, 11, 11, kind, title))
        parts.append(_text(x + 17, y, f"{spent / counted.total:.1%}  {meaning}", "small"))
        column, row = (0, row + 1) if column else (1, row)
    if counted.queued:
        x, y = _LEFT + 520 * column, top + 76 + 18 * row
        parts.append(_rect(x, y - 8, 11, _STRIP, "queue", MEANINGS["queue"]))
        text = f"{span(counted.queued)} in the queue, without nodes: the strip below the axis"
        parts.append(_text(x + 17, y, text, "small"))
        column, row = (0, row + 1) if column else (1, row)
    return parts, 76 + 18 * (row + bool(column))
