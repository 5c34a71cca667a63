"""A job as one self-contained page, or as an image. Pure, but for the templates of the pages, files of the package."""

from __future__ import annotations

import importlib
from typing import Any

import jinja2

from elastic_hpc.errors import ElasticError
from elastic_hpc.view.brought import Brought
from elastic_hpc.view.job import JobView
from elastic_hpc.view.picture import STYLE, WIDTH, draw
from elastic_hpc.view.story import Story
from elastic_hpc.view.times import clock, count, span

TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("elastic_hpc.view", ""),
    autoescape=True,
    trim_blocks=True,
    undefined=jinja2.StrictUndefined,
)


def html(view: JobView, story: Story, now: float) -> str:
    """The page. ``now``: seconds since the epoch; used only for a running job."""
    return TEMPLATES.get_template("timeline.html.j2").render(shown(view, story, now))


def shown(view: JobView, story: Story, now: float) -> dict[str, Any]:
    """What the template of the page shows. ``now``: as for ``html``."""
    return {
        "view": view,
        "story": story,
        "style": STYLE,
        "picture": draw(story, _now(view, now)),
        "numbers": _numbers(view),
        "when": _when(view, story),
        "span": span,
    }


def png(view: JobView, story: Story, now: float) -> bytes:
    """The picture alone. Raises ElasticError if the library that draws it is not installed."""
    try:
        resvg_py = importlib.import_module("resvg_py")
    except ImportError:
        raise ElasticError(
            "--png needs the package resvg-py: pip install 'elastic_hpc[png]'; --html needs nothing"
        ) from None
    picture = draw(story, _now(view, now))
    ground = f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>'
    head, tag, rest = picture.partition(">")
    return bytes(resvg_py.svg_to_bytes(svg_string=f"{head}{tag}{ground}{rest}", width=2 * WIDTH))


def _now(view: JobView, now: float) -> float | None:
    return now if view.has_nodes else None


def _numbers(view: JobView) -> list[tuple[str, str]]:
    numbers = [
        ("not reported" if view.goodput is None else f"{view.goodput:.0%}", "goodput"),
        (span(view.running), "with nodes"),
        (span(view.queued), "in the queue"),
        (span(view.lost), "lost after the first step"),
        (str(view.restarts), f"restarts of {view.max_restarts}"),
        (str(max(0, view.runs - 1 - view.resumed)), "requeues"),
    ]
    if view.resumed:
        numbers.append((str(view.resumed), "times resumed"))
    if view.growth:
        won = Brought(**view.growth)
        numbers += [
            (span(won.node_seconds), "node time by growth"),
            (f"{won.steps:.0f}", "steps by growth"),
            (span(won.standstill), "standstill for growth"),
        ]
        if won.taken:
            lost = f"taken: {span(won.taken_standstill)}, {count(won.taken_repeated, 'step')} repeated"
            numbers.append((str(won.taken), f"joiners {lost}"))
    if view.step is not None:
        numbers += [(str(view.step), "steps done"), (str(view.repeated_steps), "steps repeated")]
    return numbers


def _when(view: JobView, story: Story) -> str:
    if not story.runs:
        return "no run is on record"
    first = story.runs[0]
    begin = clock(first.started or first.began)
    if view.over:
        when = f"{begin} to {clock(story.last_time)}"
    else:
        when = f"running since {begin}" if view.has_nodes else f"first started {begin}"
    return f"{when}, {count(len(story.rounds), 'round')}"
