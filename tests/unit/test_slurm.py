"""Cases that a real Slurm of one version cannot show: different answers, late answers, no answer."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest

from elastic_hpc import slurm
from elastic_hpc.errors import SlurmError
from elastic_hpc.slurm.settings import facts

SOON = timedelta(seconds=8)
JOB = (
    "JobId=7 JobName=evil JobState=FAILED\n   UserId=me(1)\n   JobState={state} Reason={reason} Dependency=(null)\n"
    "   Requeue=1 Restarts={restarts}\n   PreemptEligibleTime=t0 PreemptTime={preempted} EndTime=t1\n   Partition=a,b\n"
    "   ReqNodeList=(null) ExcNodeList={excluded}\n   NodeList=n[1-2]\n   BatchHost=n1\n"
    "   Command=(null)\n   WorkDir=/home/my dir\n   StdErr=/dev/null\n"
    "   StdIn=/dev/null\n   StdOut=/home/my dir/a b.out\n   Power=\n"
)
RUNNING = {"state": "RUNNING", "reason": "None", "restarts": 0, "preempted": "None", "excluded": "(null)"}

PARTITIONS = """\
PartitionName=main Default=YES GraceTime=0 OverTimeLimit=NONE PreemptMode=OFF
PartitionName=low Default=NO GraceTime=90 OverTimeLimit=5 PreemptMode=REQUEUE
"""
CONFIG = """\
Configuration data as of 2026-01-01T00:00:00
JobRequeue              = 0
KillWait                = 30 sec
OverTimeLimit           = UNLIMITED
PreemptType             = preempt/partition_prio
SlurmctldParameters     = enable_configless,preempt_send_user_signal
SlurmdTimeout           = 300 sec
"""


HELD = """\
case "$1" in
  update) exec sleep 30;;
  requeue) sed -i s/Restarts=0/Restarts=1/ "{folder}/answer.show job";;
esac
"""


class Fake:
    """A ``scontrol`` that records its arguments and answers from files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.program("scontrol", 'case "$1 $2" in "show hostnames") echo "$3" | tr , "\\n";; esac')
        self.tell("show job", JOB.format(**RUNNING))

    def program(self, name: str, body: str) -> None:
        path = self.folder / name
        answer = f'answer="{self.folder}/answer.$1 $2"; [ ! -e "$answer" ] || cat "$answer"'
        path.write_text(f'#!/bin/sh\necho "$*" >> {self.folder}/calls\n{answer}\n{body}\n')
        path.chmod(0o755)

    def tell(self, command: str, text: str) -> None:
        (self.folder / f"answer.{command}").write_text(text)

    def calls(self, start: str = "") -> list[str]:
        return sorted(c for c in (self.folder / "calls").read_text().splitlines() if c.startswith(start))


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return Fake(tmp_path)


def job(**changes: object) -> slurm.SlurmJob:
    fields = {"state": "COMPLETING", "reason": "None", "restarts": 0, "may_requeue": True, "partitions": ("a",)}
    unset = {field.name: "" for field in dataclasses.fields(slurm.SlurmJob)}
    return slurm.SlurmJob(**{**unset, **fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shown", "becomes"),
    [
        (job(state="RUNNING", preempt_time="t1"), "RUNNING"),
        (job(), "CANCELLED"),
        (job(reason="TimeLimit"), "TIMEOUT"),
        (job(reason="NonZeroExitCode"), "FAILED"),
        (job(restarts=1), "REQUEUED"),
        (job(preempt_time="t1", end_time="t1"), "PREEMPTED"),
        (job(preempt_time="t0", end_time="t1"), "CANCELLED"),  # cancelled by its user after the warning of a preemption
        (job(state="NODE_FAIL"), "NODE_FAIL"),
    ],
)
def test_a_completing_job_counts_as_what_it_becomes(shown: slurm.SlurmJob, becomes: str):
    assert shown.becomes(run=0) == becomes


def test_slurms_description_of_a_job_is_read_correctly_whatever_the_jobs_name(fake: Fake):
    shown = slurm.show_job("7")
    assert (shown.state, shown.partitions, shown.folder) == ("RUNNING", ("a", "b"), "/home/my dir")
    assert (shown.required, shown.nodes, shown.preempt_time) == ("", "n[1-2]", "")
    assert (shown.output, shown.error) == ("/home/my dir/a b.out", "/dev/null")


def test_a_requeue_does_not_wait_for_a_change_that_slurm_delays(fake: Fake):
    fake.program("scontrol", HELD.format(folder=fake.folder))
    begin = time.monotonic()
    assert slurm.requeue("7", start_after=SOON, run=0) is None
    assert time.monotonic() - begin < 10
    assert fake.calls("update") == ["update JobId=7 StartTime=now+8"]


COMPLETES = r"""
case "$1 $2" in
  "show job") echo x >> {folder}/asked
    [ "$(wc -l < {folder}/asked)" -lt {after} ] || sed -i s/=n1,n2,n3/=n1,n2/ "{folder}/answer.show job";;
  "requeue incomplete")
    sed -i "s/Restarts=0/Restarts=1/; s/JobState=RUNNING/JobState=COMPLETING/" "{folder}/answer.show job";;
  "show hostnames") echo "$3" | tr , "\n";;
esac
"""


def starts(fake: Fake) -> list[int]:
    """The requested delays of the job's start in seconds, in order."""
    told = [call for call in (fake.folder / "calls").read_text().splitlines() if "StartTime=now+" in call]
    return [int(call.rpartition("+")[2]) for call in told]


@pytest.mark.parametrize(("after", "held_up"), [(3, False), (12, True)])
def test_the_start_is_delayed_beyond_an_epilog_by_the_time_that_the_first_other_node_takes_to_complete(
    fake: Fake, after: int, *, held_up: bool
):
    """And by the 10 s within which slurmd notices that the caller has ended."""
    fake.tell("show job", JOB.format(**RUNNING).replace("n[1-2]", "n1,n2,n3"))
    fake.program("scontrol", COMPLETES.format(folder=fake.folder, after=after))
    begin = time.monotonic()
    assert slurm.requeue("7", start_after=SOON, run=0) is None
    if held_up:  # after more than 2 s of this Slurm's answers
        assert starts(fake)[-1] >= 8 + 10 + int(time.monotonic() - begin) - 1 > 19
    else:
        assert starts(fake) == [8]


@pytest.mark.parametrize(("epilog", "expected"), [("/etc/epilog", [8, 38]), ("(null)", [8])])
def test_a_job_of_one_node_leaves_time_for_an_epilog(fake: Fake, epilog: str, expected: list[int]):
    fake.tell("show job", JOB.format(**RUNNING).replace("n[1-2]", "n1"))
    fake.tell("show config", f"Epilog = {epilog}\nEpilogSlurmctld = (null)\n")
    fake.program("scontrol", COMPLETES.format(folder=fake.folder, after=99))
    assert slurm.requeue("7", start_after=SOON, run=0) is None
    assert starts(fake) == expected


def test_if_the_job_is_already_requeued_the_caller_does_not_watch_it(fake: Fake):
    fake.tell("show job", JOB.format(**{**RUNNING, "restarts": 1, "state": "COMPLETING"}).replace("n[1-2]", "n1,n2"))
    begin = time.monotonic()
    assert slurm.requeue("7", start_after=SOON, run=0) is None
    assert time.monotonic() - begin < 10
    assert starts(fake) == [8]


def test_a_refused_exclusion_does_not_cost_the_early_start(fake: Fake):
    fake.tell("show job", JOB.format(**{**RUNNING, "restarts": 1, "state": "COMPLETING"}))
    fake.program("scontrol", 'case "$*" in *Exc*) echo "slurm_update error: Invalid node name" >&2; exit 1;; esac')
    refused = slurm.requeue("7", start_after=SOON, exclude=["n1"], run=0)
    assert refused == "scontrol update JobId=7 ExcNodeList=n1: slurm_update error: Invalid node name"
    assert "update JobId=7 StartTime=now+8" in fake.calls("update")


def test_exclusions_are_added_to_those_of_the_user_and_expired_exclusions_are_removed(fake: Fake):
    fake.tell("show job", JOB.format(**{**RUNNING, "restarts": 1, "state": "COMPLETING", "excluded": "n8,n9"}))
    assert slurm.requeue("7", start_after=SOON, exclude=["n1"], readmit=["n9"], run=0) is None
    assert fake.calls("update JobId=7 Exc") == ["update JobId=7 ExcNodeList=n1,n8"]


def test_a_job_that_is_cancelled_during_the_request_is_not_requeued(fake: Fake):
    with pytest.raises(SlurmError, match="ended before it could be requeued"):  # Slurm itself reports nothing
        slurm.requeue("7", start_after=SOON, run=0)
    assert fake.calls("requeue") == ["requeue incomplete 7"]
    assert fake.calls("update") == []


def test_if_slurm_does_not_answer_about_a_job_it_is_not_cancelled(fake: Fake):
    fake.program("scontrol", "echo 'Unable to contact slurm controller' >&2; exit 1")
    fake.program("scancel", "")
    with pytest.raises(SlurmError, match="Unable to contact"):
        slurm.complete("7", start_after=SOON)
    assert fake.calls("7") == []


def test_the_site_settings_are_read_for_the_jobs_partition(fake: Fake):
    fake.tell("show config", CONFIG)
    fake.tell("show partition", PARTITIONS)
    low = slurm.site("low,main")
    assert low == slurm.Site(
        kill_wait=timedelta(seconds=30),
        grace_time=timedelta(seconds=90),
        job_requeue=False,
        preempt_mode="REQUEUE",
        warns_before_preemption=True,
    )
    assert slurm.site(None).preempt_mode == "OFF"
    for none in ("preempt/none", "(null)"):
        fake.tell("show config", CONFIG.replace("preempt/partition_prio", none))
        assert slurm.site("low").preempt_mode == "OFF"
    with pytest.raises(SlurmError, match="partition 'x': unknown"):
        slurm.site("x")


@pytest.mark.parametrize(
    ("shown", "prolog", "epilog"),
    [
        ("Prolog   = /etc/p\nEpilog = (null)\n", "/etc/p", "(null)"),  # 22.05
        ("Prolog[0] = /etc/p\nProlog[1] = /etc/q\n", "/etc/p,/etc/q", "(null)"),  # 24.11
    ],
)
def test_a_prolog_is_read_alone_or_in_a_list(fake: Fake, shown: str, prolog: str, epilog: str):
    fake.tell("show config", CONFIG + shown)
    fake.tell("show partition", PARTITIONS)
    config = facts(None).config
    assert (config["Prolog"], config["Epilog"]) == (prolog, epilog)
    assert (config["PrologSlurmctld"], config["EpilogSlurmctld"]) == ("(null)", "(null)")


def test_a_slow_slurm_does_not_delay_a_submission(fake: Fake):
    fake.program("scontrol", "exec sleep 30")
    begin = time.monotonic()
    with pytest.raises(SlurmError, match="no answer in 2 s"):
        slurm.site(None)
    assert time.monotonic() - begin < 10


def test_missing_settings_are_an_error_and_not_a_guess(fake: Fake):
    fake.tell("show config", "KillWait = 30 sec\n")
    fake.tell("show partition", PARTITIONS)
    with pytest.raises(SlurmError, match="expected"):
        slurm.site(None)


def test_nodes_that_are_down_drained_silent_or_in_another_partition_are_not_usable(fake: Fake):
    states = {
        "n1": "IDLE", "n2": "ALLOCATED+NOT_RESPONDING", "n3": "DOWN*", "n4": "IDLE+DRAIN",
        "n5": "IDLE+CLOUD+POWERED_DOWN", "n6": "MIXED+COMPLETING",
    }  # fmt: skip
    lines = [f"NodeName={name} State={state} Partitions=x,b" for name, state in states.items()]
    lines[2] += " Reason=was State=IDLE [root@t0]"
    fake.tell("show node", "\n".join([*lines, "NodeName=n7 State=IDLE Partitions=c"]))
    assert slurm.usable_nodes("7") == ({"n1", "n5", "n6"}, "")


@pytest.mark.parametrize("refuses", [True, False])
def test_if_the_site_hides_its_nodes_those_of_the_partition_count_as_usable_and_the_reason_is_reported(
    fake: Fake, *, refuses: bool
):
    refusal = 'echo "slurm_load_node error: Access/permission denied" >&2; exit 1' if refuses else ":"
    hosts = 'echo "$3" | tr , "\\n"'
    fake.program("scontrol", f'case "$1 $2" in "show node") {refusal};; "show hostnames") {hosts};; esac')
    lines = ["PartitionName=d Nodes=n8", "PartitionName=b Nodes=n1,n2", "PartitionName=a Nodes=(null)"]
    fake.tell("show partition", "\n".join([*lines, "PartitionName=c Nodes=n9"]))
    nodes, problem = slurm.usable_nodes("7")
    assert nodes == {"n1", "n2"}
    assert ("denied" in problem) if refuses else problem


def test_without_slurm_the_error_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match=r"scontrol show job 7: No such file"):
        slurm.job_state("7")


def test_a_step_has_the_settings_of_its_job_and_nothing_of_the_step_or_shell_that_starts_it():
    job = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "1", "SLURM_CONF": "/x", "ELASTIC_HPC_FIRST_RUN": "2"}
    own = {"PATH": "/bin", "ELASTIC_HPC_CONFIG": "site.toml", "OMP_NUM_THREADS": "4"}
    left = ("SLURM_GPUS_PER_TASK", "SLURM_PROCID", "SRUN_CPUS_PER_TASK", "SALLOC_QOS", "SBATCH_QOS", "SLURMD_NODENAME")
    left += ("PMI_RANK", "PMIX_RANK", "SPANK_X", "_SLURM_SPANK_OPTION_x", "ELASTIC_HPC_AGENT", "ELASTIC_HPC_LOCAL_NODE")
    assert slurm.step_environment({**job, **own, **dict.fromkeys(left, "1")}) == {**job, **own}


@pytest.mark.parametrize(("shown", "says"), [("10 sec", True), ("300 sec", False), ("0 sec", False)])
def test_the_sites_settings_decide_whether_slurm_soon_notices_a_lost_node(fake: Fake, shown: str, *, says: bool):
    fake.tell("show config", f"SlurmdTimeout           = {shown}\n")
    assert slurm.notices_within(60) is says


def test_an_ended_job_gives_up_its_lost_nodes_but_never_its_batch_host(fake: Fake):
    fake.tell("show job", JOB.replace("n[1-2]", "n1,n2,n3").format(**RUNNING))
    slurm.release("7", [])
    slurm.release("7", ["n1"])
    slurm.release("7", ["n3"])
    assert fake.calls("update") == ["update JobId=7 NodeList=n1,n2"]


def test_all_exported_names_exist_and_an_agent_has_imported_them_in_advance() -> None:
    code = (
        "import sys, elastic_hpc.agent; from elastic_hpc import slurm; "
        "print(set(slurm.__all__) - vars(slurm).keys(), len(slurm.__all__) == len(slurm._MODULE_OF))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set() True\n"
    with pytest.raises(AttributeError, match="has no attribute 'nosuch'"):
        _ = slurm.nosuch
