"""The doctor's findings on sites as Slurm describes them, and on reports of nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from elastic_hpc import slurm
from elastic_hpc.cli import hpc
from elastic_hpc.doctor import probe
from elastic_hpc.doctor.findings import Finding, Level, as_json, site_file, worst_first
from elastic_hpc.doctor.log_dir import file_system, log_dir_finding
from elastic_hpc.doctor.nodes import run_findings
from elastic_hpc.doctor.reports import Dial, NodeReport, PeerReport, ProbeRun
from elastic_hpc.doctor.slurm_settings import slurm_findings
from elastic_hpc.job.config import load
from elastic_hpc.options.sbatch import SBATCH, Given
from elastic_hpc.record.rundir import RunDir

SITES = Path(__file__).parent / "sites"
GRACE = timedelta(seconds=90)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on PATH with Slurm's commands, which print the output of the captured site; tests may change it."""
    (tmp_path / "config").write_text((SITES / "mini.config").read_text())
    (tmp_path / "partitions").write_text((SITES / "mini.partitions").read_text())
    (tmp_path / "help").write_text("      --container             Path to OCI container bundle\n")
    program(tmp_path, "scontrol", f'case "$2" in config) cat {tmp_path}/config;; *) cat {tmp_path}/partitions;; esac')
    program(tmp_path, "srun", f"cat {tmp_path}/help")
    program(
        tmp_path,
        "sacctmgr",
        f'case "$*" in *" associations "*) cat {tmp_path}/associations;; *) cat {tmp_path}/qos;; esac',
    )
    (tmp_path / "associations").write_text("mini|research||\nelsewhere|research|1|low\n")
    (tmp_path / "qos").write_text(
        "normal|||cluster|00:00:00\nlow|1||requeue|00:00:10\nhigh||low,lowcancel|cluster|00:00:00\n"
    )
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    monkeypatch.delenv("ELASTIC_HPC_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def program(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def change(file: Path, **settings: str) -> None:
    lines = file.read_text().splitlines()
    for name, value in settings.items():
        assert any(line.split(" ")[0] == name for line in lines), name
        lines = [f"{name} = {value}" if line.split(" ")[0] == name else line for line in lines]
    file.write_text("\n".join(lines))


def add(file: Path, **settings: str) -> None:
    """Additional output of newer versions of Slurm."""
    file.write_text(file.read_text() + "".join(f"\n{name} = {value}" for name, value in settings.items()))


def about(findings: list[Finding], name: str) -> Finding:
    (found,) = [finding for finding in findings if finding.about == name]
    return found


def judged(partition: str | None, name: str) -> Finding:
    return about(slurm_findings(slurm.facts(partition), GRACE), name)


def test_a_site_that_suits_elastic_jobs_gets_good_findings(commands: Path):
    findings = slurm_findings(slurm.facts(None), GRACE)
    assert {finding.about: finding.level for finding in findings} == {
        **dict.fromkeys(
            (
                *("requeue", "KillOnBadExit", "SlurmdTimeout", "KillWait", "preemption", "job arrays"),
                "private data",
            ),
            Level.OK,
        ),
        "accounting": Level.NOTE,
        "giving back": Level.NOTE,
        "pyxis": Level.NOTE,
    }


def test_for_a_site_that_forbids_requeue_the_finding_names_the_setting(commands: Path):
    change(commands / "config", JobRequeue="0")
    found = judged(None, "requeue")
    assert (found.level, found.found) == (Level.WARN, "JobRequeue = 0")
    assert "JobRequeue=1" in found.set
    assert "new job with another ID" in found.means


@pytest.mark.parametrize(
    ("name", "value", "finding", "level", "says"),
    [
        ("KillOnBadExit", "1", "KillOnBadExit", Level.NOTE, "srun --kill-on-bad-exit=0"),
        ("SlurmdTimeout", "300 sec", "SlurmdTimeout", Level.NOTE, "SlurmdTimeout=60"),
        ("SlurmdTimeout", "0 sec", "SlurmdTimeout", Level.WARN, "SlurmdTimeout=300"),
        ("KillWait", "10 sec", "KillWait", Level.WARN, "KillWait=30"),
        ("MaxArraySize", "1", "job arrays", Level.NOTE, "--array"),
        ("PrivateData", "jobs,nodes", "private data", Level.NOTE, "PrivateData without nodes"),
    ],
)
def test_for_each_costly_setting_the_finding_names_the_better_value(
    commands: Path, name: str, value: str, finding: str, level: Level, says: str
):
    change(commands / "config", **{name: value})
    found = judged(None, finding)
    assert found.level is level
    assert f"{name} = {value}" in found.found
    assert says in found.set


def test_a_job_keeps_its_lost_nodes_where_slurm_lets_no_job_shrink(commands: Path):
    change(commands / "config", SlurmdTimeout="300 sec")
    assert "lost its first node" in judged(None, "SlurmdTimeout").means
    change(commands / "config", SchedulerParameters="bf_interval=1,disable_job_shrink")
    found = judged(None, "SlurmdTimeout")
    assert "has disable_job_shrink" in found.found
    assert "lost a node stays COMPLETING, or waits in the queue, for 300 s and more" in found.means
    assert "without disable_job_shrink" in found.set


def test_the_doctor_reports_whether_a_running_job_may_give_nodes_back(commands: Path):
    change(commands / "config", AccountingStorageType="accounting_storage/slurmdbd")
    assert judged(None, "giving back").level is Level.OK
    change(commands / "config", AccountingStorageType="accounting_storage/none")
    assert "a job can return nodes once in a run" in judged(None, "giving back").means
    change(commands / "config", SchedulerParameters="bf_interval=1,disable_job_shrink")
    found = judged(None, "giving back")
    assert (found.level, found.found) == (Level.WARN, "SchedulerParameters has disable_job_shrink")


def test_a_prolog_and_an_epilog_are_reported_with_their_limit_and_the_wait_of_a_requeue(commands: Path):
    change(commands / "config", Prolog="/site/prolog", Epilog="/site/epilog", CompleteWait="32 sec")
    found = judged(None, "prolog")
    assert (found.level, found.found) == (Level.NOTE, "Prolog = /site/prolog, PrologEpilogTimeout = none")
    assert "--wait-for-nodes" in found.set
    assert "PrologEpilogTimeout=300" in found.set
    found = judged(None, "epilog")
    assert found.found == "Epilog = /site/epilog, PrologEpilogTimeout = none, CompleteWait = 32 s"
    assert "up to 32 s" in found.means
    assert "121 s after that" in found.means
    change(commands / "config", PrologEpilogTimeout="600", AuthInfo="socket=/run/munge,cred_expire=30")
    assert judged(None, "epilog").set == "you: --run measures how long the epilog takes"
    assert " s after that" not in judged(None, "epilog").means
    assert "Slurm drains the node" in judged(None, "prolog").means
    add(commands / "config", PrologTimeout="65534", EpilogTimeout="60")  # since 25.11
    assert "PrologTimeout = none" in judged(None, "prolog").found
    assert "EpilogTimeout = 60 s" in judged(None, "epilog").found


def test_only_for_a_slurm_that_could_requeue_sooner_does_the_finding_show_how(commands: Path):
    def told() -> list[Finding]:
        return [one for one in slurm_findings(slurm.facts(None), GRACE) if one.about == "requeue delay"]

    assert not told()
    change(commands / "config", SLURM_VERSION="25.11.2")
    (found,) = told()
    assert "121 s after its completion" in found.means
    assert "requeue_delay=5" in found.set
    change(commands / "config", SchedulerParameters="requeue_delay=5")
    assert not told()


def test_users_for_whom_slurm_may_expedite_a_requeue_are_advised_against_it(commands: Path):
    change(commands / "config", SlurmctldParameters="enable_configless,enable_expedited_requeue")
    found = judged(None, "expedited requeue")
    assert (found.level, "--requeue=expedite" in found.set) == (Level.NOTE, True)


def test_default_memory_is_reported_where_the_kernel_enforces_it(commands: Path):
    change(commands / "config", SelectTypeParameters="CR_CORE_MEMORY", DefMemPerNode="2048")
    assert not [one for one in slurm_findings(slurm.facts(None), GRACE) if one.about == "memory"]
    change(commands / "config", TaskPlugin="task/cgroup,task/affinity")
    found = judged(None, "memory")
    assert (found.level, found.found) == (Level.NOTE, "DefMemPerNode = 2048")
    text = (commands / "partitions").read_text()
    (commands / "partitions").write_text(text.replace("DefMemPerNode=UNLIMITED", "DefMemPerCPU=1000"))
    found = judged("low", "memory")
    assert found.found == "DefMemPerCPU = 1000"
    assert "1000 MiB for each of its CPUs" in found.means
    assert "--mem=0" in found.set
    add(commands / "config", ConstrainRAMSpace="no")
    assert not [one for one in slurm_findings(slurm.facts("low"), GRACE) if one.about == "memory"]


@pytest.mark.parametrize(
    ("associations", "level", "says"),
    [
        ("mini|research|1|normal", Level.WARN, "no joiner starts while the job that needs it runs"),
        ("mini|research|4|\nmini|other||normal", Level.NOTE, "at most 3 run beside the job that grows"),
        ("mini|research||\nelsewhere|research|1|low", None, ""),
    ],
)
def test_limits_that_affect_joiners_are_reported(commands: Path, associations: str, level: Level | None, says: str):
    (commands / "associations").write_text(associations)
    change(commands / "config", ClusterName="mini")
    assert not [one for one in slurm_findings(slurm.facts(None), GRACE) if one.about == "limits"]
    change(commands / "config", AccountingStorageEnforce="associations,limits,qos")
    found = [one for one in slurm_findings(slurm.facts(None), GRACE) if one.about == "limits"]
    assert [one.level for one in found] == ([level] if level else [])
    assert all(says in one.means and "in account research" in one.found for one in found)
    found = [one for one in slurm_findings(slurm.facts(None), GRACE, "low") if one.about == "limits"]
    assert "MaxJobsPerUser = 1 in QOS low" in found[0].found


def test_limits_that_slurm_does_not_show_are_unknown(commands: Path):
    program(commands, "sacctmgr", 'echo "sacctmgr: error: Problem talking to the database" >&2; exit 1')
    change(commands / "config", AccountingStorageEnforce="associations,limits")
    found = judged(None, "limits")
    assert (found.level, "Problem talking to the database" in found.found) == (Level.UNKNOWN, True)


def test_a_preemption_without_warning_is_reported_with_the_time_that_workers_have(commands: Path):
    found = judged("lowcancel", "preemption")
    assert found.level is Level.WARN
    assert (
        found.found == "partition lowcancel: PreemptMode = CANCEL, GraceTime = 10 s, without preempt_send_user_signal"
    )
    assert "at most 10 s" in found.means
    assert "--grace 5" in found.set
    assert not found.config


def test_a_preemption_that_is_announced_too_late_for_the_grace_gives_the_grace_to_set(commands: Path):
    change(commands / "config", SlurmctldParameters="preempt_send_user_signal")
    found = judged("low", "preemption")
    assert found.level is Level.WARN
    assert "--grace 5" in found.set
    assert found.config == {"grace": 5}
    enough = slurm_findings(slurm.facts("low"), timedelta(seconds=10))
    assert about(enough, "preemption").level is Level.OK


def test_preemption_by_qos_is_judged_by_the_qos_of_the_users_jobs(commands: Path):
    change(commands / "config", PreemptType="preempt/qos", SlurmctldParameters="preempt_send_user_signal")
    found = judged("low", "preemption")
    assert (found.level, found.means) == (Level.OK, "jobs in QOS normal are not preempted")
    found = about(slurm_findings(slurm.facts(None), GRACE, "low"), "preemption")
    assert found.found == "QOS low: PreemptMode = REQUEUE, GraceTime = 10 s, with preempt_send_user_signal"
    assert (found.level, found.config) == (Level.WARN, {"grace": 5})
    (commands / "associations").write_text("mini|research||low\n")
    assert judged(None, "preemption").found.startswith("QOS low: ")
    (commands / "qos").write_text("")
    found = judged(None, "preemption")
    assert (found.level, found.found) == (Level.UNKNOWN, "sacctmgr shows no QOS low")


def test_a_partition_that_suspends_jobs_harms_no_job(commands: Path):
    text = (commands / "partitions").read_text()
    (commands / "partitions").write_text(text.replace("PreemptMode=REQUEUE", "PreemptMode=GANG,SUSPEND"))
    found = judged("low", "preemption")
    assert (found.level, "continues where it was" in found.means) == (Level.OK, True)


def test_a_preemption_without_grace_time_adds_no_grace_to_the_site_file(commands: Path):
    change(commands / "config", SlurmctldParameters="preempt_send_user_signal")
    text = (commands / "partitions").read_text()
    (commands / "partitions").write_text(text.replace("GraceTime=10", "GraceTime=0"))
    found = judged("low", "preemption")
    assert (found.level, found.config) == (Level.WARN, {})


def test_pyxis_and_accounting_are_detected(commands: Path):
    (commands / "help").write_text("      --container-image=[USER@][REGISTRY#]IMAGE[:TAG]|PATH\n")
    change(commands / "config", AccountingStorageType="accounting_storage/slurmdbd")
    assert judged(None, "pyxis").level is Level.OK
    assert judged(None, "accounting").level is Level.OK


@pytest.mark.parametrize(
    ("scontrol", "says"),
    [
        ('echo "slurm_load_ctl_conf error: Unable to contact slurm controller" >&2; exit 1', "Unable to contact"),
        ('echo "scontrol: error: resolve_ctls_from_dns_srv: Unknown host" >&2; exit 1', "Unknown host"),
        ("exec sleep 1000", "no answer in 0.5 s"),
        (None, "scontrol show config: No such file or directory"),
    ],
)
def test_a_slurm_that_does_not_answer_is_one_bad_finding(
    commands: Path,
    scontrol: str | None,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr("elastic_hpc.slurm.settings._FACTS_SECONDS", 0.5 if says.startswith("no answer") else 15)
    if scontrol is None:
        monkeypatch.setenv("PATH", str(commands / "none"))
    else:
        program(commands, "scontrol", scontrol)
    for options in ([], ["--run"], ["--write-site", "site.toml"]):
        assert hpc.main(["doctor", "--json", *options]) == 1
        first, *others = json.loads(capsys.readouterr().out)["findings"]
        assert (first["level"], first["about"]) == ("bad", "Slurm")
        assert says in first["found"]
        assert {one["about"] for one in others} == {"configuration files", "log-dir"}
    assert not Path("site.toml").exists()


def test_facts_that_slurm_was_not_asked_for_are_unknown_and_never_good(commands: Path):
    program(commands, "scontrol", f'[ "$2" = partition ] && cat {commands}/partitions || exit 1')
    found = judged(None, "requeue")
    assert (found.level, found.found) == (Level.UNKNOWN, "scontrol show config: exit code 1")


def test_a_setting_that_this_slurm_does_not_show_is_unknown(commands: Path):
    text = (commands / "config").read_text()
    (commands / "config").write_text(text.replace("KillWait ", "KillPatience "))
    found = judged(None, "KillWait")
    assert (found.level, found.found) == (Level.UNKNOWN, "scontrol show config does not show KillWait")


MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw
30 22 0:27 / /dev/shm rw shared:3 - tmpfs tmpfs rw
31 22 0:40 / /scratch rw - lustre mds@tcp:/scratch rw
32 22 0:41 / /home/my\\040group rw master:5 - nfs4 server:/home rw
"""


@pytest.mark.parametrize(
    ("path", "kind", "level"),
    [
        ("/scratch/me/elastic-logs", "lustre", Level.OK),
        ("/home/my group/elastic-logs", "nfs4", Level.OK),
        ("/dev/shm/logs", "tmpfs", Level.BAD),
        ("/tmp/logs", "ext4", Level.WARN),
        ("/scratchy/logs", "ext4", Level.UNKNOWN),
    ],
)
def test_the_file_system_of_the_run_directories_is_judged_by_its_type(path: str, kind: str, level: Level):
    assert file_system(MOUNTS, path)[0] == kind
    assert log_dir_finding(MOUNTS, path).level is level


def report(node: str, *others: str, **changes: object) -> NodeReport:
    number = node[1:]
    made = NodeReport(
        node=node,
        hostname=node,
        python="3.11.2",
        torch="2.13.0",
        elastic_hpc="0.1.0",
        interfaces={"lo": "127.0.0.1", "eth0": f"10.0.0.{number}", "ib0": f"10.1.0.{number}"},
        gpus_granted=None,
        gpus_visible=None,
        gpu_devices=0,
        created=node == "n1",
        peers={name: peer(name) for name in others},
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def peer(name: str, error: str = "", ib0: str = "", any_port: str = "", ahead: float = 0.0) -> PeerReport:
    eth, ib = f"10.0.0.{name[1:]}", f"10.1.0.{name[1:]}"
    dials = (
        Dial(eth, 29400, any_port=False, error=error),
        Dial(eth, 40001, any_port=True, error=any_port or error),
        Dial(ib, 29400, any_port=False, error=ib0),
        Dial(ib, 40001, any_port=True, error=any_port or ib0),
    )
    return PeerReport((eth,), dials, ahead, 0.1, lock_held=True)


def ran(*reports: NodeReport, nodes: tuple[str, ...] = ("n1", "n2", "n3"), **changes: object) -> list[Finding]:
    run = ProbeRun(nodes, reports, may_requeue=True, ended="COMPLETED", completed_after=1.0)
    return run_findings(replace(run, **changes), "/logs")  # type: ignore[arg-type]


ALL = (report("n1", "n2", "n3"), report("n2", "n1", "n3"), report("n3", "n1", "n2"))


def test_nodes_that_agree_are_healthy():
    findings = ran(*ALL)
    assert {f.about: f.level for f in findings if f.level is not Level.OK} == {"GPUs": Level.NOTE}
    assert {"requeue", "nodes", "ports", "names", "file system", "clocks", "software"} < {f.about for f in findings}


def test_reports_survive_the_way_through_a_file():
    assert NodeReport.of(json.loads(json.dumps(ALL[0].as_body()))) == ALL[0]
    with pytest.raises(ValueError, match="another version"):
        NodeReport.of({"schema": 7})


def test_a_node_that_never_reported_is_named_with_its_last_output():
    findings = ran(*ALL[:2], causes={"n3": "probe of n3: /logs/doctor.0 is not there", "": "the end of the log"})
    found = about(findings, "nodes")
    assert found.level is Level.BAD
    assert found.found == "n3 never reported: probe of n3: /logs/doctor.0 is not there"
    assert "--exclude n3" in found.set


def test_a_job_without_any_report_points_at_the_shared_file_system():
    found = about(ran(ended="FAILED", causes={"": "it has no log"}), "nodes")
    assert found.level is Level.BAD
    assert "FAILED; it has no log" in found.found
    assert "--log-dir DIR that all nodes share (now /logs)" in found.set


def test_a_closed_port_is_reported_with_its_direction():
    cut = peer("n1", "timed out", "timed out", "timed out")
    found = about(ran(*ALL[:2], replace(ALL[2], peers={"n1": cut, "n2": peer("n2")})), "ports")
    assert found.level is Level.BAD
    assert found.found == "n3 cannot reach n1 (10.0.0.1:29400 timed out, 10.1.0.1:29400 timed out)"


def test_a_firewall_that_opens_the_agents_ports_alone_is_found():
    peers = {"n1": peer("n1", any_port="timed out"), "n2": peer("n2")}
    assert about(ran(*ALL[:2], replace(ALL[2], peers=peers)), "ports of workers").level is Level.BAD


def test_an_open_network_becomes_the_interface_to_set_if_the_first_is_closed():
    shut = [replace(one, peers={name: peer(name, "timed out") for name in one.peers}) for one in ALL]
    found = about(ran(*shut), "addresses")
    assert (found.level, found.config) == (Level.WARN, {"interface": "ib0"})
    assert "--interface ib0" in found.set


def test_a_name_that_resolves_to_another_host_is_reported():
    wrong = replace(peer("n1"), resolves=("127.0.1.1",))
    found = about(ran(*ALL[:2], replace(ALL[2], peers={"n1": wrong, "n2": peer("n2")})), "names")
    assert (found.level, found.found) == (Level.WARN, "n3 resolves n1 to 127.0.1.1")


def test_a_clock_that_is_ahead_is_reported():
    peers = {"n1": peer("n1", ahead=-30), "n2": peer("n2", ahead=-30)}
    found = about(ran(*ALL[:2], replace(ALL[2], peers=peers)), "clocks")
    assert (found.level, found.found) == (Level.WARN, "n3 is 30.0 s ahead of n1")


@pytest.mark.parametrize("changes", [{"torch": "2.4.0"}, {"python": "3.10.1"}, {"torch": ""}])
def test_a_node_with_different_software_is_reported(changes: dict[str, str]):
    found = about(ran(*ALL[:2], replace(ALL[2], **changes)), "software")  # type: ignore[arg-type]
    assert found.level is Level.BAD
    assert "n3" in found.found


def test_a_file_system_on_which_two_nodes_create_the_same_file_first_is_bad():
    found = about(ran(*ALL[:2], replace(ALL[2], created=True)), "file system")
    assert (found.level, found.found.split(" made")[0]) == (Level.BAD, "n1, n3")


def test_a_file_system_that_shows_new_files_late_is_slow():
    late = {name: replace(peer(name), seen_after=6.0) for name in ("n1", "n2")}
    found = about(ran(*ALL[:2], replace(ALL[2], peers=late)), "file system")
    assert found.level is Level.WARN
    assert "6.00 s" in found.found


def test_locks_that_other_nodes_do_not_see_are_a_note():
    free = {name: replace(peer(name), lock_held=False) for name in ("n1", "n2")}
    assert about(ran(*ALL[:2], replace(ALL[2], peers=free)), "flock").level is Level.NOTE


def test_granted_gpus_without_a_driver_are_a_bad_finding():
    with_gpus = [replace(one, gpus_granted="4", gpus_visible="0,1,2,3", gpu_devices=4) for one in ALL]
    assert about(ran(*with_gpus), "GPUs").found == "4 on each node"
    bare = about(ran(*with_gpus[:2], replace(with_gpus[2], gpu_devices=0)), "GPUs")
    assert (bare.level, "n3" in bare.found) == (Level.BAD, True)


def test_a_submission_filter_that_removes_requeue_is_found():
    assert about(ran(*ALL, may_requeue=False), "requeue").level is Level.WARN


@pytest.mark.parametrize(
    ("seconds", "says"), [(40.0, "were free 40 s after"), (45.0, "were still not free 45 s after")]
)
def test_a_long_completion_is_found(seconds: float, says: str):
    found = about(ran(*ALL, completed_after=seconds), "epilog")
    assert (found.level, says in found.found) == (Level.WARN, True)


def test_one_node_alone_gives_no_findings_on_ports_and_files():
    findings = ran(report("n1"), nodes=("n1",))
    assert {f.about for f in findings if f.level is Level.UNKNOWN} == {"ports", "file system", "clocks"}


def test_the_worst_finding_comes_first():
    found = [Finding(level, level.value, "", "") for level in (Level.OK, Level.NOTE, Level.BAD, Level.UNKNOWN)]
    assert [finding.about for finding in worst_first(found)] == ["bad", "unknown", "note", "ok"]


def test_the_site_file_is_read_without_errors(tmp_path: Path):
    finding = Finding(Level.WARN, "preemption", 'GraceTime = 10 s, "quoted"\nand # more', "", "", {"grace": 5})
    other = Finding(Level.WARN, "addresses", "n1", "", "", {"interface": "ib0"})
    options = [Given(SBATCH["partition"], 'my "low" \\ one'), Given(SBATCH["exclusive"], None)]
    options += [Given(SBATCH["nodelist"], "n1")]  # variables of one job
    (tmp_path / "site.toml").write_text(site_file([finding, other], options, "/scratch/me/logs"))
    settings = load({"ELASTIC_HPC_CONFIG": str(tmp_path / "site.toml"), "XDG_CONFIG_HOME": "/nowhere"}, tmp_path)
    assert settings.options["grace"].value == timedelta(seconds=5)
    assert settings.options["interface"].value == "ib0"
    assert settings.options["log-dir"].value == "/scratch/me/logs"
    assert [(given.name, given.value) for given in settings.sbatch] == [
        ("partition", 'my "low" \\ one'),
        ("exclusive", None),
    ]
    (tmp_path / "site.toml").write_text(site_file([], []))
    assert not load(
        {"ELASTIC_HPC_CONFIG": str(tmp_path / "site.toml"), "XDG_CONFIG_HOME": "/nowhere"}, tmp_path
    ).options


def test_the_command_writes_a_site_file_once(commands: Path, capsys: pytest.CaptureFixture[str]):
    change(commands / "config", SlurmctldParameters="preempt_send_user_signal")
    command = ["doctor", "--json", "--log-dir", "/dev/shm/logs", "--partition", "low", "--write-site", "site.toml"]
    assert hpc.main(command) == 1  # a folder in memory is a bad finding
    body = json.loads(capsys.readouterr().out)
    assert body["schema"] == 1
    assert body["findings"][0]["about"] == "log-dir"
    settings = load({"ELASTIC_HPC_CONFIG": "site.toml", "XDG_CONFIG_HOME": "/nowhere"}, commands)
    assert settings.options["grace"].value == timedelta(seconds=5)
    assert hpc.main(command) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_broken_configuration_file_is_a_finding(commands: Path, capsys: pytest.CaptureFixture[str]):
    (commands / "elastic_hpc.toml").write_text("grace = nine\n")
    assert hpc.main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert shown.startswith("bad ")
    assert "elastic_hpc.toml" in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--partition", "nope"], "unknown to Slurm; see sinfo"),
        (["--nodes", "3"], "for the job of --run"),
        (["--run", "--", "--nodes=3"], "--nodes belongs before --"),
        (["--run", "--", "train.py"], "expected options of sbatch after --"),
        (["--run", "--nodes", "0"], "expected a number of nodes"),
    ],
)
def test_the_error_for_bad_input_shows_what_to_type(
    commands: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
):
    assert hpc.main(["doctor", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_job_that_slurm_refuses_is_a_finding_and_leaves_nothing_behind(
    commands: Path, capsys: pytest.CaptureFixture[str]
):
    program(
        commands, "sbatch", 'cat >/dev/null; echo "sbatch: error: Batch job submission failed: No account" >&2; exit 1'
    )
    assert hpc.main(["doctor", "--run", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["findings"][0]
    assert (found["level"], found["about"]) == ("bad", "nodes")
    assert "No account" in found["found"]
    assert not (commands / "elastic-logs").exists()


def test_two_nodes_find_each_other_and_agree(tmp_path: Path):
    """Two probes on this machine: different names, the same network."""
    rundir = RunDir(tmp_path / "doctor.0").create()
    rundir.make_secret()
    try:
        probe.addresses.to_publish("n1", None, None)
    except probe.ElasticError:
        pytest.skip("this machine has no network but loopback")

    def node(name: str) -> None:
        assert probe.probe(rundir.path, None, {"SLURMD_NODENAME": name, "SLURM_STEP_NUM_NODES": "2"}) == 0

    threads = [threading.Thread(target=node, args=(name,)) for name in ("n1", "n2")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reports = [NodeReport.of(rundir.read(f"report.{name}.json") or {}) for name in ("n1", "n2")]
    levels = {f.about: f.level for f in ran(*reports, nodes=("n1", "n2"))}
    assert [levels[name] for name in ("nodes", "ports", "file system", "clocks", "software")] == [Level.OK] * 5


def test_a_node_without_the_folder_reports_that(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert probe.main([str(tmp_path / "absent")]) == 1
    assert f"{tmp_path / 'absent'} is not there" in capsys.readouterr().err


def test_the_findings_are_json_with_a_stable_schema():
    body = json.loads(as_json([Finding(Level.NOTE, "a", "b", "c", "d", {"grace": 5})]))
    assert body == {
        "schema": 1,
        "findings": [{"level": "note", "about": "a", "found": "b", "means": "c", "set": "d", "config": {"grace": 5}}],
    }


def test_the_command_imports_no_torch():
    code = "import sys, elastic_hpc.cli.doctor; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
