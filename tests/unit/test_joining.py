"""Joiners: their version of the parent's batch script, and Slurm's answers about them and their parent."""

from __future__ import annotations

import contextlib
import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
from cluster import wait_for

from elastic_hpc import slurm
from elastic_hpc.environment import AGAIN, JOIN
from elastic_hpc.errors import SlurmError, UsageError
from elastic_hpc.options.sbatch import SBATCH

PARENT = (
    "JobId=4714 ArrayJobId=4711 ArrayTaskId=3 JobName=x JobState=PENDING\n   UserId=me(1)\n   JobState=RUNNING "
    "Account={account} QOS={qos}\n   RunTime={used} TimeLimit={limit}\n   Partition=a\n   NodeList=n1\n"
    "   ExcNodeList=n9\n   Command=(null)\n   WorkDir=/home/my dir\n   StdErr=/x\n"
)
HOUR = {"account": "(null)", "qos": "N/A", "used": "00:30:01", "limit": "01:00:00"}

PROGRAM = """\
#!/bin/sh
answer="{folder}/answer.{name}"
case {name} in sbatch) printf '%s\\n' "$@" > {folder}/options; env > {folder}/environ; cat > {folder}/script;; esac
echo "$*" >> {folder}/calls
[ ! -e {folder}/refusal ] || {{ cat {folder}/refusal >&2; exit 1; }}
cat "$answer"
"""


class Fake:
    """Commands of Slurm with prepared answers or refusals."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("scontrol", "squeue", "sbatch", "scancel"):
            (folder / name).write_text(PROGRAM.format(folder=folder, name=name))
            (folder / name).chmod(0o755)
            self.tell(name, "")
        self.tell("scontrol", PARENT.format(**HOUR))
        self.tell("sbatch", "4720;mini\n")

    def tell(self, name: str, text: str) -> None:
        (self.folder / f"answer.{name}").write_text(text)

    def refuse(self, text: str) -> None:
        (self.folder / "refusal").write_text(text)

    def said(self, name: str) -> list[str]:
        return (self.folder / name).read_text().splitlines()

    def submit(self, script: str = "#!/bin/bash\n", exclude: tuple[str, ...] = (), **environ: str) -> str | None:
        environ = {**os.environ, **environ}
        log = Path("/run/join-%j.log")
        return slurm.submit_joiner(
            "4711_3", script.encode(), environ=environ, run_dir=Path("/run"), log=log, exclude=exclude
        )


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return Fake(tmp_path)


@pytest.mark.parametrize(
    ("line", "left"),
    [
        ("#SBATCH --nodes=2-4", None),
        ("#SBATCH --nodes 2-4   # MIN-MAX", None),
        ("#SBATCH -N2", None),
        ("#SBATCH\t-N\t2", None),
        ("#SBATCH--nodes=2", None),
        ("#SBATCH --depend=afterok:1", None),
        ("#SBATCH --mail END,FAIL", None),
        ("#SBATCH --hold", None),
        ("#SBATCH --requeue", None),
        ("#SBATCH --wait", None),
        ('#SBATCH --job-name="a \\" # b" -o \'x y\'', None),
        ("#SBATCH --begin=now+1\\ hour", None),
        ("#SBATCH -t10#comment", None),
        ("#SBATCH --no-kill --open-mode=append", ...),
        ('#SBATCH --comment="--nodes=2 # x"', ...),
        ("#SBATCH --signal=B:USR2@120 --gpus-per-node=a100:2 --mem=0", ...),
        ("#SBATCH -N 2 --exclusive  -J x # why", "#SBATCH --exclusive # why"),
        ("#SBATCH   --comment='a b'\t--array=1-3 -c 2", "#SBATCH   --comment='a b' -c 2"),
        ("#SBATCH -HOn4", "#SBATCH -O"),
        ("#SBATCH -OHc2", "#SBATCH -Oc2"),
        ("#SBATCH -HOm block", "#SBATCH -Om block"),
        ("#SBATCH --unheard=of --nodes=2", "#SBATCH --unheard=of"),
        ("#SBATCH --unheard of --nodes=2", ...),  # cannot be parsed: it is unclear which words are options
        ('#SBATCH --comment="no end --nodes=2', ...),
        ("#SBATCH --nodes", ...),
        ("#SBATCH --nodes=2 stray", ...),
        ('#SBATCH -"HO"', ...),
        ("#SBATCH # --nodes=2", ...),
        (" #SBATCH --nodes=2", ...),  # a comment for sbatch
        ("##SBATCH --nodes=2", ...),
        ("# \udce9\x85 --nodes=2", ...),
        ("", ...),
    ],
)
def test_a_joiners_script_keeps_the_directives_for_one_node(line: str, left: object):
    left = line if left is ... else left
    for before, after in [("#!/bin/bash\n", "\n# c\n\ntrue\n"), ("#!/bin/bash\n\n  # c\n", "")]:
        script = (before + line + after).encode(errors="surrogateescape")
        expected = before + (after[1:] if left is None else f"{left}{after}")
        assert slurm.joiner_script(script) == expected.encode(errors="surrogateescape")


def test_lines_after_the_first_command_are_not_directives():
    for command in ("true", " : x", "#SBATCH --nodes=2\ncat <<END"):
        script = f"#!/bin/sh\n{command}\n#SBATCH --array=1-2\r\n\xe9\x85".encode("latin-1")
        assert slurm.joiner_script(script).endswith(b"\n#SBATCH --array=1-2\r\n\xe9\x85")


def test_every_option_is_kept_or_dropped_in_all_its_forms():
    for option in SBATCH.values():
        value = "=1" if option.value else ""
        forms = [f"--{option.name}{value}", *([f"-{option.letter}{value[1:]}"] if option.letter else [])]
        left = {bool(slurm.joiner_script(f"#SBATCH {form}\n".encode())) for form in forms}
        assert len(left) == 1, option
        kept = {"account", "cpus-per-task", "exclusive", "gpus-per-node", "gres", "mem", "no-kill", "reservation"}
        assert left == {True} or option.name not in kept


def test_a_joiner_is_submitted_for_one_node_with_the_partition_and_time_of_its_parent(fake: Fake):
    fake.tell("scontrol", PARENT.format(account="acc", qos="fast", used="1-00:30:01", limit="1-01:00:00"))
    script = "#!/bin/sh\n#SBATCH -x n[1-2] --time=2\n#SBATCH --export=ALL,A=b --gres=gpu:1\nsrun x\n"
    agent = {"SLURM_JOB_ID": "1", "ELASTIC_HPC_AGENT": "mark", AGAIN: "2", "HELLO": "a, b=c"}
    assert fake.submit(script, ("n5", "n4"), **agent) == "4720"
    assert fake.said("options") == [
        "--parsable", "--job-name=join-4711_3", "--nodes=1", "--no-requeue", "--output=/run/join-%j.log", "--time=30",
        "--export=ALL", "--exclude=n[1-2],n4,n5", "--partition=a", "--account=acc", "--qos=fast",
        "--chdir=/home/my dir",
    ]  # fmt: skip
    assert fake.said("script") == ["#!/bin/sh", "#SBATCH --gres=gpu:1", "srun x"]
    environ = dict(line.split("=", 1) for line in fake.said("environ") if "=" in line)
    assert (environ[JOIN], environ["HELLO"]) == ("/run", "a, b=c")
    assert environ.keys().isdisjoint({"SLURM_JOB_ID", "ELASTIC_HPC_AGENT", AGAIN})


@pytest.mark.parametrize("no_limit", ["UNLIMITED", "365-00:00:00"])
def test_a_joiner_does_not_request_what_the_parent_does_not_have(fake: Fake, no_limit: str):
    fake.tell("scontrol", PARENT.format(**{**HOUR, "limit": no_limit}))
    fake.submit()
    options = fake.said("options")
    assert f"--time={no_limit}" in options
    assert not [option for option in options if option.startswith(("--account", "--qos", "--exclude"))]


def test_a_file_of_excluded_nodes_was_read_for_the_parent(fake: Fake):
    fake.submit("#SBATCH --exclude=./bad\n", ("n1",))
    assert "--exclude=n9,n1" in fake.said("options")


@pytest.mark.parametrize(("used", "id"), [("00:59:00", "4720"), ("00:59:01", None), ("01:00:05", None)])
def test_no_joiner_is_submitted_for_the_last_minute(fake: Fake, used: str, id: str | None):
    fake.tell("scontrol", PARENT.format(**{**HOUR, "used": used}))
    assert fake.submit() == id


def test_a_parent_whose_time_is_unknown_is_not_one_without_limit(fake: Fake):
    fake.tell("scontrol", PARENT.format(**{**HOUR, "limit": "Partition_Limit"}))
    with pytest.raises(SlurmError, match="Partition_Limit"):
        fake.submit()


def test_gpus_of_the_whole_job_are_refused_for_a_joiner(fake: Fake):
    with pytest.raises(UsageError, match="--gpus-per-node"):
        fake.submit("#SBATCH -G 8\n")


def test_the_refusal_of_a_joiner_has_slurms_own_text(fake: Fake):
    fake.tell("scontrol", PARENT.format(**HOUR))
    (fake.folder / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1\n")
    with pytest.raises(UsageError, match="QOSMaxSubmitJobPerUserLimit"):
        fake.submit()


def test_joiners_are_read_whatever_text_their_reason_has(fake: Fake, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SQUEUE_STATES", "FAILED")
    fake.tell(
        "squeue",
        "5|PENDING||n[1-2],n4|2:00|(a | b), c\n6|RUNNING|n1||1-00:00:30|None\n7|COMPLETING|n2|(null)|UNLIMITED|x\n"
        "8|PENDING|||365-00:00:00|None\n",
    )
    assert slurm.joiners("4711_3") == (
        slurm.Joiner("5", "PENDING", "", "(a | b), c", "n[1-2],n4", timedelta(minutes=2)),
        slurm.Joiner("6", "RUNNING", "n1", "None", "", timedelta(days=1, seconds=30)),
        slurm.Joiner("7", "COMPLETING", "n2", "x", "", None),
        slurm.Joiner("8", "PENDING", "", "None", "", None),
    )
    assert "--name=join-4711_3" in fake.said("calls")[0]
    fake.tell("squeue", "")
    assert slurm.joiners("4711_3") == ()


def test_if_slurm_does_not_answer_the_joiners_are_unknown_and_not_none(fake: Fake):
    fake.tell("squeue", "slurm_load_jobs: no\n")
    with pytest.raises(SlurmError, match="six fields"):
        slurm.joiners("1")
    fake.refuse("slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n")
    with pytest.raises(SlurmError, match="Unable to contact"):
        slurm.joiners("1")


def test_the_job_for_new_steps_is_known_by_its_number(fake: Fake):
    assert slurm.show_job("4711_3").id == "4714"


def test_a_time_limit_is_set_in_whole_minutes_and_never_to_none(fake: Fake):
    slurm.change_time_limit("5", timedelta(seconds=179))
    slurm.change_time_limit("5", timedelta(seconds=5))
    assert fake.said("calls") == ["update JobId=5 TimeLimit=2", "update JobId=5 TimeLimit=1"]


def test_cancelling_an_ended_job_is_no_error(fake: Fake):
    slurm.cancel()
    fake.refuse(
        "scancel: error: Kill job error on job id 5: Job/step already completing or completed\n"
        "scancel: error: Kill job error on job id 6: Invalid job id specified\n"
    )
    slurm.cancel("5", "6")
    assert fake.said("calls") == ["5 6"]
    fake.refuse("scancel: error: Kill job error on job id 5: Access/permission denied\n")
    with pytest.raises(SlurmError, match="denied"):
        slurm.cancel("5")


def agent(folder: Path, srun: str) -> None:
    """Start an agent with an ``srun`` that runs this code."""
    (folder / "srun").write_text(f"#!/bin/sh\n{srun}\n")
    (folder / "srun").chmod(0o755)
    environ = {**os.environ, "SLURM_NTASKS": "4", "SLURM_RESTART_COUNT": "2", "ELASTIC_HPC_AGENT": "mark", AGAIN: "1"}
    command = ["sh", "-c", 'env > "$0.new"; mv "$0.new" "$0"', str(folder / "a b")]
    slurm.start_agent("7", "n2", command, environ, folder / "log", "2")


def _is_dead(pid: int) -> bool:
    """Whether the process has ended, even if it was not reaped yet."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    return True


def test_an_agent_starts_whatever_a_prolog_prints_and_knows_its_job(fake: Fake):
    pids = fake.folder / "pids"
    agent(
        fake.folder,
        f'echo "$*" > {fake.folder}/calls; until [ $1 = sh ]; do shift; done; echo hello; exec 3<&0\n'
        f"sleep 600 & echo $$ $! > {pids}\n"  # srun and its own watchdog process
        '( setsid "$@" <&3 & ); wait',
    )
    srun, watch = map(int, pids.read_text().split())
    assert not Path(f"/proc/{srun}").exists(), "the agent needs no srun"
    wait_for(lambda: _is_dead(watch))
    while not (fake.folder / "a b").exists():
        time.sleep(0.01)
    assert "--nodelist=n2 " in fake.said("calls")[0]
    assert "--cpus-per-task=2 " in fake.said("calls")[0]
    environ = dict(line.split("=", 1) for line in fake.said("a b") if "=" in line)
    assert (environ["SLURM_RESTART_COUNT"], environ[AGAIN]) == ("2", "1")
    assert environ.keys().isdisjoint({"SLURM_NTASKS", "ELASTIC_HPC_AGENT"})


def test_an_agent_that_does_not_start_is_an_error_with_sruns_text(fake: Fake):
    (fake.folder / "log").write_text("srun: error: of another one\n")
    with pytest.raises(SlurmError, match=r"--nodelist=n2: Unable to create step$"):
        agent(fake.folder, "echo srun: hm >&2; echo srun: error: Unable to create step >&2; exit 1")
    with pytest.raises(SlurmError, match="ended before it had started"):
        agent(fake.folder, "echo hello")
    assert not (fake.folder / "a b").exists()


def test_the_steps_of_restarted_agents_are_known_by_their_nodes(fake: Fake):
    fake.tell(
        "squeue", "7.0 n[1-4] python\n7.3 n2 elastic-agent\n7.4 n3 elastic-conclude\n7.5 n4 elastic-agent\n7.6  x\n"
    )
    shown = "JobId=7 JobName=x\n   UserId=me(1000)\n   JobState=RUNNING\n   NodeList=n[2-3]"
    (fake.folder / "scontrol").write_text(f"#!/bin/sh\n[ $2 = hostnames ] && echo n2 n3 || echo '{shown}'\n")
    assert slurm.agent_steps("7") == {"n2": "7.3"}, "Slurm has taken n4 from the job, and goes on listing its step"
    assert fake.said("calls")[0] == "--noheader --steps --jobs=7 --format=%i %N %j"
    fake.refuse("slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n")
    with pytest.raises(SlurmError, match="Unable to contact"):
        slurm.agent_steps("7")
