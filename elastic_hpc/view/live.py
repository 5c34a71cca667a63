"""The pages of ``elastic-hpc serve``. Pure, but for their templates, files of the package."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from elastic_hpc.view.job import JobView
from elastic_hpc.view.picture import STYLE
from elastic_hpc.view.story import Story
from elastic_hpc.view.timeline import TEMPLATES, shown
from elastic_hpc.view.times import span


class Button(NamedTuple):
    """What a user can do with a job. ``name``: in the URL; ``summary``: on the button; ``question``: to confirm."""

    name: str
    summary: str
    question: str


ACTIONS = (
    Button("drain", "drain", "The workers save and stop, and the job returns to the queue under its own ID."),
    Button("save-and-stop", "save and stop", "The workers save, and the job ends. It is not requeued."),
    Button("stop", "stop at once", "The job ends at once. The steps since the last checkpoint are lost."),
)


def jobs_page(jobs: Sequence[tuple[str, JobView]], problem: str, nonce: str) -> str:
    """All jobs, each with its key, the last part of the URL of its page. ``problem``: why Slurm does not answer.
    ``nonce``: the nonce of the only script that the browser may run.
    """
    template = TEMPLATES.get_template("jobs.html.j2")
    return template.render(jobs=jobs, problem=problem, nonce=nonce, style=STYLE, span=span)


def job_page(
    view: JobView, story: Story, now: float, *, key: str, why: str, log: Iterable[str], said: str, nonce: str
) -> str:
    """One job. ``now``: seconds since the epoch. ``why``: the text of ``elastic-hpc why``. ``log``: the last lines of
    the workers' output. ``said``: what the last action has done. ``key`` and ``nonce``: as for ``jobs_page``.
    """
    return TEMPLATES.get_template("job.html.j2").render(
        **shown(view, story, now), key=key, why=why, log="\n".join(log), said=said, actions=ACTIONS, nonce=nonce
    )
