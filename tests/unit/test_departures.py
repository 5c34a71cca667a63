"""Which nodes a job leaves before they fail or are taken away, according to Slurm, the site's files or a notice."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from test_slurm import Fake

from elastic_hpc import slurm
from elastic_hpc.errors import SlurmError
from elastic_hpc.membership.departures import AHEAD, Departure, departures
from elastic_hpc.record.health import mark, marked, unmark

NODE = """\
NodeName={name} Arch=x86_64 CoresPerSocket=2
   NodeAddr={name} NodeHostName={name} Version=22.05.8
   State={state} ThreadsPerCore=1 TmpDisk=0 Weight=1 Owner=N/A MCS_label=N/A
   Partitions=main
{more}
"""
RESERVATIONS = """\
ReservationName=day StartTime=2026-11-29T20:03:23 EndTime=2026-11-29T21:03:23 Duration=01:00:00 Nodes=n[1,3] \
PartitionName=(null) Flags=MAINT,IGNORE_JOBS,SPEC_NODES Users=root State=INACTIVE
ReservationName=course StartTime=2026-11-29T20:03:23 EndTime=2026-11-29T21:03:23 Nodes=n2 Flags=SPEC_NODES Users=me
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return Fake(tmp_path)


def test_slurm_shows_which_nodes_are_drained_and_with_which_reason(fake: Fake):
    shown = [
        NODE.format(name="n1", state="MIXED", more=""),
        NODE.format(
            name="n2", state="MIXED+DRAIN", more="   Reason=ECC = rising State=IDLE [root@2026-11-29T19:53:23]"
        ),
        NODE.format(name="n3", state="ALLOCATED+DRAIN+REBOOT_REQUESTED*", more="   Reason=Reboot ASAP [me@t]"),
        NODE.format(name="n4", state="FAILING", more=""),
        NODE.format(name="n5", state="DOWN*", more="   Reason=Not responding [slurm@t]"),
    ]
    fake.tell("show node", "\n".join(shown))
    assert slurm.out_of_service(["n2", "n1", "n3", "n4", "n5"]) == {
        "n2": "drained in Slurm: ECC = rising State=IDLE",
        "n3": "drained in Slurm: Reboot ASAP",
        "n4": "set to fail in Slurm",
    }
    assert fake.calls("show node") == ["show node n[1-5]"]


def test_hidden_nodes_are_an_error_and_do_not_count_as_healthy(fake: Fake):
    fake.program("scontrol", 'echo "slurm_load_node error: Access/permission denied" >&2; exit 1')
    with pytest.raises(SlurmError, match="denied"):
        slurm.out_of_service(["n1"])


def test_only_reservations_for_maintenance_count(fake: Fake):
    fake.tell("show reservation", RESERVATIONS)
    (planned,) = slurm.maintenance()
    assert (planned.name, planned.nodes, planned.end - planned.start) == ("day", "n[1,3]", 3600)
    fake.tell("show reservation", "No reservations in the system\n")
    assert slurm.maintenance() == []


def test_the_job_leaves_nodes_some_minutes_before_their_maintenance_and_may_keep_them_after_it():
    planned = [("day", "n[2-3]", 10_000.0, 20_000.0)]

    def left(now: float) -> dict[str, Departure]:
        return departures(["n1", "n2"], planned, [], now)

    assert left(10_000 - AHEAD - 1) == {}
    assert left(10_000 - AHEAD) == {"n2": Departure("maintenance in Slurm: day", 10_000)}
    assert left(19_999) == left(10_000 - AHEAD)
    assert left(20_000) == {}


def test_a_node_has_one_reason_and_the_earliest_time_by_which_the_job_must_leave_it():
    planned = [("later", "n1", 200.0, 900.0), ("day", "n1", 100.0, 900.0)]
    bad = [{"n1": "drained in Slurm: ECC"}, {"n1": "another", "n9": "no node of the job"}]
    assert departures(["n1"], planned, bad, 50.0) == {"n1": Departure("drained in Slurm: ECC", 100.0)}


def test_a_file_that_is_not_empty_marks_its_node_whatever_its_content(tmp_path: Path):
    for name, content in (
        ("n1", b""),
        ("n2", b"ECC \xff\x1b[31m errors\nmore"),
        ("n3", b"\n"),
        ("n4.a-b", b"x" * 9999),
    ):
        (tmp_path / f"segment_health_check.{name}").write_bytes(content)
    (tmp_path / "segment_health_check.n5").mkdir()
    (tmp_path / "n6").write_text("another file of the site")
    assert marked(tmp_path) == {
        "n2": "ECC \ufffd [31m errors",
        "n3": "its health file says no more",
        "n4.a-b": "x" * 200,
    }
    with pytest.raises(FileNotFoundError):
        marked(tmp_path / "missing")


def test_a_notice_is_read_whole_until_it_is_withdrawn_or_a_day_old(tmp_path: Path):
    folder = tmp_path / "notices"
    mark(folder, "n2", "ECC errors")
    mark(folder, "n2", "ECC errors rising")
    assert marked(folder) == {"n2": "ECC errors rising"}
    assert oct(folder.stat().st_mode & 0o777) == "0o700"
    assert marked(folder, time.time() + 1) == {}
    assert unmark(folder, "n2")
    assert not unmark(folder, "n2")
    assert os.listdir(folder) == []
