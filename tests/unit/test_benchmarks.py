"""The model of benchmarks/goodput.py compared with closed forms, and the table of benchmarks/run.py."""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from torch_214 import IN_PLACE, TORCH_214

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import goodput
import run
from _month import DAY, Inputs, Launcher, Recovery, launchers, simulate
from _report import BenchmarkError, figure

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ELASTIC, SPARED, REQUEUE, TORCHRUN, *_ = launchers(Recovery(), 512)
INPUTS = Inputs(nodes=512, rate=0.005)


def trained(inputs: Inputs, by: Launcher, seeds: int = 10) -> float:
    """Share of the month in which the job trains, mean of ``seeds`` months."""
    months = [simulate(inputs, by, seed) for seed in range(seeds)]
    return statistics.mean(month.trained / inputs.horizon for month in months)


def used(inputs: Inputs, by: Launcher, seeds: int = 10) -> float:
    """Share of the held node-hours that went into kept steps."""
    months = [simulate(inputs, by, seed) for seed in range(seeds)]
    return statistics.mean(month.trained * inputs.nodes / month.node_seconds for month in months)


@pytest.mark.parametrize("by", launchers(Recovery(), 512), ids=lambda by: by.name)
def test_without_failures_only_checkpoints_cost_time(by):
    inputs = replace(INPUTS, rate=0.0, interval=1000.0, save=50.0)
    month = simulate(inputs, by, seed=1)
    assert month.interruptions == month.queued == 0
    assert month.trained / inputs.horizon == pytest.approx(1000 / 1050, rel=1e-3)
    assert month.node_seconds == pytest.approx(inputs.horizon * (inputs.nodes + by.spares))


def test_without_failures_a_job_saves_once_a_month():
    assert replace(INPUTS, rate=0.0).every == INPUTS.horizon


@pytest.mark.parametrize("by", launchers(Recovery(), 512), ids=lambda by: by.name)
def test_more_failures_leave_less_training(by):
    shares = [trained(replace(INPUTS, rate=rate), by) for rate in (0.001, 0.004, 0.016)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1] + 0.02


@pytest.mark.parametrize("save", [10.0, 120.0])
def test_a_job_that_is_only_requeued_follows_the_closed_form_of_daly(save):
    inputs = replace(INPUTS, process=1.0, save=save, load=0.0)  # only requeues, all alike
    mtbf = DAY / (inputs.nodes * inputs.rate)
    a_segment = (mtbf + REQUEUE.requeue) * math.expm1((inputs.every + save) / mtbf)
    assert trained(inputs, REQUEUE, seeds=40) == pytest.approx(inputs.every / a_segment, rel=0.01)


@pytest.mark.parametrize("times", [1 / 4, 4.0])
def test_the_interval_of_young_and_daly_is_better_than_others(times):
    best = trained(INPUTS, REQUEUE)
    assert trained(replace(INPUTS, interval=INPUTS.every * times), REQUEUE) < best


def test_spares_cost_no_more_than_their_own_idle_hours():
    for nodes in (16, 128, 512):
        inputs = replace(INPUTS, nodes=nodes)
        assert trained(inputs, SPARED) > trained(inputs, ELASTIC) - 0.002
        idle = SPARED.spares / (nodes + SPARED.spares)
        assert used(inputs, SPARED) > used(inputs, ELASTIC) * (1 - idle) - 0.002


def test_a_job_that_continues_with_fewer_nodes_trains_while_a_rigid_job_waits_for_a_node():
    slow = replace(INPUTS, replacement=6 * 3600.0)
    assert trained(slow, REQUEUE) < trained(INPUTS, REQUEUE) - 0.1
    assert trained(slow, ELASTIC) > trained(INPUTS, ELASTIC) - 0.01


def test_a_job_with_fewer_than_min_nodes_is_requeued():
    inputs = replace(INPUTS, nodes=16, rate=0.5)
    assert simulate(inputs, ELASTIC, seed=1).queued > 0
    assert simulate(inputs, replace(ELASTIC, least=1 / 16), seed=1).queued == 0


def test_the_same_seed_gives_the_same_month():
    assert simulate(INPUTS, SPARED, seed=7) == simulate(INPUTS, SPARED, seed=7)
    assert simulate(INPUTS, SPARED, seed=7) != simulate(INPUTS, SPARED, seed=8)


def test_a_slower_recovery_leaves_less_training():
    assert trained(INPUTS, replace(ELASTIC, node=600.0, worker=600.0, head=600.0)) < trained(INPUTS, ELASTIC)
    assert trained(INPUTS, TORCHRUN) >= trained(INPUTS, REQUEUE)


def test_recovery_times_come_from_the_benchmark_that_measured_them():
    rows = [
        {"rung": "worker", "launcher": "elastic", "total": {"median": 0.5}},
        {"rung": "agent", "launcher": "torchrun-own-store", "total": {"median": 40.0}},
        {"rung": "power", "launcher": "elastic", "total": None},
        {"rung": "worker", "launcher": "elastic-cold", "total": {"median": 6.0}},
    ]
    assert Recovery.of(rows) == replace(Recovery(), worker=0.5, torchrun_node=40.0)


def test_the_table_goes_between_its_marks_and_leaves_the_rest_of_the_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"above\n{run.BEGIN}\nold\n{run.END}\nbelow\n")
    for _ in range(2):
        run.write_page(page, run.markdown([figure("a", 2.0, "torchrun", 9.0)], "On a machine."))
    assert page.read_text().startswith(f"above\n{run.BEGIN}\nOn a machine.\n\n| what | ours |")
    assert "| a | 2 s | 9 s | x 4.5 | torchrun |" in page.read_text()
    assert page.read_text().endswith(f"|\n{run.END}\nbelow\n")


def test_a_page_without_the_marks_is_left_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text\n")
    with pytest.raises(BenchmarkError, match="expected the lines"):
        run.write_page(page, "table")
    assert page.read_text() == "text\n"


def test_the_page_of_the_docs_has_the_marks():
    text = run.PAGE.read_text()
    assert text.count(run.BEGIN) == text.count(run.END) == 1
    assert text.index(run.BEGIN) < text.index(run.END)


def test_a_peer_without_a_result_has_no_ratio():
    line = figure("a power loss", 5.0, "torchrun", None, note="stuck: no step in 30 s")
    assert run.cells(line) == ["a power loss", "5 s", "-", "", "torchrun", "stuck: no step in 30 s"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123, "0.012"), (0.97, "0.97"), (9.96, "10.0"), (99.4, "99.4"), (99.7, "100"), (1234.0, "1234")],
)
def test_figures_show_only_significant_digits(value, text):
    assert run.figures(value) == text


def test_a_part_that_fails_is_named_and_the_others_continue(monkeypatch):
    monkeypatch.setattr(goodput, "SIZES", (16,))
    everything = run.Run(None, minutes=1)
    everything.measure(["submit", "goodput"])
    assert everything.failed == {"submit": "it needs a mini-slurm"}
    assert everything.found["goodput"]["table"]


@IN_PLACE
def test_torch_reconfigures_the_process_group_of_the_gpu_benchmark():
    code = "import gpu; print(gpu.reconfigures('gloo', 'cpu')); print(gpu.reconfigures('no_backend', 'cpu'))"
    done = subprocess.run([TORCH_214, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    gloo, unknown = done.stdout.splitlines()
    assert gloo == "yes"
    assert "no_backend" in unknown
