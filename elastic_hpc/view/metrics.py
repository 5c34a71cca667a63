"""Jobs as Prometheus metrics, so that a site's dashboard can show goodput. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from elastic_hpc.view.job import JobView
from elastic_hpc.view.story import Story

GAUGES = {
    "nodes": "Nodes of the world that trains.",
    "workers": "Workers of the world that trains.",
    "step": "Last training step that was reported.",
    "steps_per_second": "Training steps a second, lately.",
    "loss": "Last loss that was reported.",
    "goodput_ratio": "Share of the nodes' time that produced training steps which were kept.",
    "time_left_seconds": "Until the time limit.",
    "leader_silent_seconds": "Since the last sign of a leader.",
    "hang_timeout_seconds": "Silence of the workers after which they are declared hung.",
}
COUNTERS = {
    "runs": "Starts of the job.",
    "rounds": "Worlds that were formed.",
    "restarts": "Restarts of the workers that were charged.",
    "requeues": "Requeues that were charged.",
    "repeated_steps": "Training steps that were repeated after a restart.",
    "queued_seconds": "Spent in the queue.",
    "running_seconds": "With nodes.",
    "lost_seconds": "Since the first training step, without one that was kept.",
}
"""Each has the label ``job``. A metric that is unknown for a job has no sample for it."""


class JobMetrics(Collector):
    """``look`` is called at each scrape. It returns the jobs, and whether Slurm answered."""

    def __init__(self, look: Callable[[], tuple[Sequence[tuple[JobView, Story]], bool]]) -> None:
        self._look = look

    def collect(self) -> Iterator[Metric]:
        """All metrics of all jobs, as they are now."""
        jobs, answered = self._look()
        yield GaugeMetricFamily("elastic_hpc_slurm_up", "Whether Slurm answered when it was asked.", float(answered))
        yield _family(
            GaugeMetricFamily("elastic_hpc_job_info", "1 for each job.", labels=("job", "script", "state")),
            (((view.id, view.script, view.state), 1) for view, _ in jobs),
        )
        for name, text in GAUGES.items():
            gauge = GaugeMetricFamily(f"elastic_hpc_{name}", text, labels=("job",))
            yield _family(gauge, (((view.id,), _gauge(view, name)) for view, _ in jobs))
        for name, text in COUNTERS.items():
            counter = CounterMetricFamily(f"elastic_hpc_{name}", text, labels=("job",))
            yield _family(counter, (((view.id,), _count(view, story, name)) for view, story in jobs))
        spent = CounterMetricFamily(
            "elastic_hpc_node_seconds", "The nodes' time, by what it was spent on.", labels=("job", "kind")
        )
        yield _family(
            spent, (((view.id, kind), seconds) for view, _ in jobs for kind, seconds in view.node_seconds.items())
        )
        slow = GaugeMetricFamily(
            "elastic_hpc_slow_node_ratio",
            "Nodes that are slower than the others, and how many times.",
            labels=("job", "node"),
        )
        yield _family(slow, (((view.id, node), times) for view, _ in jobs for node, times in view.slow.items()))
        faults = CounterMetricFamily(
            "elastic_hpc_faults", "Rounds that a fault ended, by its kind.", labels=("job", "kind")
        )
        yield _family(faults, (((view.id, kind), count) for view, story in jobs for kind, count in _faults(story)))


def _family(family: Metric, samples: Iterable[tuple[Sequence[str], float | None]]) -> Metric:
    for labels, value in samples:
        if value is not None:
            family.add_metric(labels, value)  # type: ignore[attr-defined]  # of both families, not of their base
    return family


def _gauge(view: JobView, name: str) -> float | None:
    if name == "nodes":
        return len(view.nodes) if view.state == "RUNNING" else 0
    if name == "workers":
        return view.world_size if view.state == "RUNNING" else 0
    field = {"goodput_ratio": "goodput", "time_left_seconds": "time_left", "leader_silent_seconds": "silent"}
    field["hang_timeout_seconds"] = "hang_timeout"
    value: float | None = getattr(view, field.get(name, name))
    return value


def _count(view: JobView, story: Story, name: str) -> float:
    if name == "rounds":
        return len(story.rounds)
    return float(getattr(view, name.removesuffix("_seconds")))


def _faults(story: Story) -> Iterable[tuple[str, int]]:
    return Counter(round.faults[0].kind for round in story.rounds if round.faults).items()
