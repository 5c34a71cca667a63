"""A job survives random faults, one after another: benchmarks/soak.py, shorter."""

from __future__ import annotations

import _cluster
import soak
from conftest import STATE, Cluster
from on_demand import ON_DEMAND


@ON_DEMAND
def test_a_job_with_random_faults_completes_with_every_step_in_order(fresh: Cluster) -> None:
    report = soak.soak(_cluster.Cluster(STATE), seed=2, faults=6, deadline=120)
    assert report.problems == [], report.evidence
    assert len(report.faults) == 6
