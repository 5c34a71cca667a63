"""``elastic-hpc metrics``: output for Prometheus, in a file or on a port."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import records
from prometheus_client.parser import text_string_to_metric_families

from elastic_hpc.cli.hpc import main


def samples(text: str) -> dict[tuple[str, str, str], float]:
    """Value by name, job and other label."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            other = next((value for label, value in sample.labels.items() if label != "job"), "")
            found[sample.name, sample.labels.get("job", ""), other] = sample.value
    return found


def test_the_file_has_goodput_faults_and_counters_of_each_job(tmp_path: Path) -> None:
    file = tmp_path / "jobs.prom"
    assert main(["metrics", *(str(records.FOLDER / name) for name in ("faults", "broken")), "--output", str(file)]) == 0
    found = samples(file.read_text())
    assert found["elastic_hpc_restarts_total", "faults", ""] == 2
    assert found["elastic_hpc_runs_total", "faults", ""] == 2
    assert found["elastic_hpc_step", "faults", ""] == 400
    assert found["elastic_hpc_faults_total", "faults", "node lost"] == 1
    assert found["elastic_hpc_faults_total", "broken", "exception"] == 2
    assert ("elastic_hpc_step", "broken", "") not in found
    spent = {
        other: value
        for (name, job, other), value in found.items()
        if name == "elastic_hpc_node_seconds_total" and job == "faults"
    }
    assert found["elastic_hpc_goodput_ratio", "faults", ""] == pytest.approx(spent["kept"] / sum(spent.values()))
    assert found["elastic_hpc_slurm_up", "", ""] == 1
    assert list(tmp_path.iterdir()) == [file], "it is replaced at once, and nothing else is left"


def test_metrics_are_served_until_ctrl_c_and_updated_at_each_scrape(tmp_path: Path) -> None:
    folder = records.copy("faults", tmp_path)
    command = [sys.executable, "-m", "elastic_hpc", "metrics", str(folder), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        said = re.match(r"(http://127\.0\.0\.1:\d+/metrics), until Ctrl-C", process.stderr.readline())
        assert said
        for runs in (2, 1):
            with urllib.request.urlopen(said[1], timeout=30) as answer:
                assert samples(answer.read().decode())["elastic_hpc_runs_total", "faults", ""] == runs
            records.write(folder, records.events("faults")[:8])
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0


def test_an_unwritable_file_and_an_unusable_port_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["metrics", "--output", "/nonexistent/folder/file"]) == 1
    assert "/nonexistent/folder/file: No such file or directory" in capsys.readouterr().err
    assert main(["metrics", "--every", "5"]) == 2
    assert main(["metrics", "--port", "99999"]) == 2
    assert "--port '99999': expected a port" in capsys.readouterr().err
