"""elastic-sbatch against a real sbatch, slurmctld and srun. No torch: the template starts a few lines of shell."""

import base64
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEMPLATE = """\
#!/bin/bash
{% include "directives.j2" %}
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
run_dir={{ job.log_dir | quote }}/"$job"
mkdir -p "$run_dir"
{% include "prepare.j2" %}
scontrol show job "$SLURM_JOB_ID" > "$run_dir/job"
srun {{ srun_options | quote_all }} {{ python | quote }} -c 'import elastic_hpc' && hostname > "$run_dir/imported"
srun -N1 -n1 printf '%s\\0' {{ launch.script_args | list | quote_all }} > "$run_dir/args"
env > "$run_dir/env"
touch "$run_dir/done"
"""


class User:
    """The unprivileged user in a folder of their own, with a script and the template above."""

    def __init__(self, cluster, folder):
        self.cluster, self.folder = cluster, folder
        text = base64.b64encode(TEMPLATE.encode()).decode()
        self.shell(f"cd {self.folder} && echo pass > train.py && echo {text} | base64 -d > probe.j2")

    def shell(self, command, **options):
        return self.cluster.exec(["bash", "-c", command], **options)

    def elastic_sbatch(self, *argv, environ=(), check=True):
        command = [sys.executable, str(ROOT / "bin" / "elastic-sbatch"), *argv]
        return self.cluster.exec(["env", f"--chdir={self.folder}", *environ, *command], check=check)

    def submitted(self, *argv, **options):
        return self.elastic_sbatch("--parsable", "--template=./probe.j2", "-t10", *argv, **options).stdout.strip()

    def recorded(self, job, name):
        """The bytes of a file in the run directory of ``job``, once the job is done."""
        path = f"{self.folder}/elastic-logs/{job}"
        wait = f"for i in $(seq 300); do [ -e {path}/done ] && break; sleep 0.1; done"
        return base64.b64decode(self.shell(f"{wait}; base64 {path}/{name}").stdout)


@pytest.fixture
def user(fresh, folder):
    return User(fresh, folder)


def test_arguments_arrive_byte_for_byte_through_sbatch_and_srun(user):
    words = ["a b", "", "it's", '"', "\\", "$HOME", "`id`", "*", "--nodes", "--", "ü€😀", "x\r\ny\t\x1b", "\udcff", ""]
    job = user.submitted("-N1", "train.py", *words)
    assert user.recorded(job, "args") == "".join(word + "\0" for word in words).encode(errors="surrogateescape")


def test_directives_arrive_as_given_with_comments_behind_them_and_all_granted_nodes_import_the_checkout(user):
    name, comment = 'my hetjob #1 "x" \\ packjob', "it's # a 'b' = ü"
    job = user.submitted("-N", "2:4", "-J", name, f"--comment={comment}", "--no-kill", "train.py")
    shown = user.recorded(job, "job").decode()
    for text in (f"JobName={name}\n", " NumNodes=4 ", " Requeue=1 "):
        assert text in shown
    assert re.search(rf"^   Comment={re.escape(comment)} ?$", shown, re.MULTILINE)
    assert user.recorded(job, "imported")


def test_the_job_starts_on_fewer_nodes_than_max_if_no_more_are_available(user):
    job = user.submitted("-N", "2:4", "--exclude=n4", "train.py")
    assert "NumNodes=3 " in user.recorded(job, "job").decode()


def test_slurms_variables_of_the_caller_are_settings_of_sbatch_or_change_nothing(user):
    bad = ["SBATCH_NO_REQUEUE=1", "SLURM_NTASKS=3", "SLURM_CPU_BIND=nonsense", "SRUN_CPUS_PER_TASK=99", "MINE=1"]
    own = ["--setup", "export SRUN_CPUS_PER_TASK=99", "train.py"]
    job = user.submitted("-N1", *own, environ=[*bad, "SLURM_JOB_ID=1", "SBATCH_JOB_NAME=of the profile"])
    shown = user.recorded(job, "job").decode()
    assert " Requeue=1 " in shown
    assert "JobName=of the profile\n" in shown
    environ = user.recorded(job, "env").decode().splitlines()
    assert "MINE=1" in environ
    assert "SLURM_CPU_BIND=nonsense" not in environ


def test_each_task_of_an_array_has_its_own_run_directory(user):
    job = user.submitted("-N1", "--array=3,5", "train.py", "x")
    assert [user.recorded(f"{job}_{task}", "args") for task in (3, 5)] == [b"x\0", b"x\0"]


def test_requested_cores_reach_the_step(user):
    job = user.submitted("-N1", "-c2", "train.py")
    assert "SRUN_CPUS_PER_TASK=2" in user.recorded(job, "env").decode().splitlines()


@pytest.mark.parametrize("template", ["elastic", "torchrun"])
def test_slurm_accepts_every_built_in_script(user, template):
    done = user.elastic_sbatch("--test-only", "--template", template, "-N", "2:4", "--gpus-per-node=1", "train.py")
    assert re.search(r"Job \d+ to start at", done.stderr)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--partition=nope", "invalid partition specified: nope"),
        ("--from-the-future=1", "unrecognized option '--from-the-future=1'"),
        ("--time=soon", "Invalid --time specification"),
    ],
)
def test_a_refusal_by_slurm_is_one_line_and_exit_code_2(user, option, message):
    done = user.elastic_sbatch("-N1", option, "train.py", check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("elastic-sbatch: Slurm refused the job: ")
    assert message in done.stderr  # a site's own text may precede it


def test_a_requeued_job_starts_soon_and_avoids_the_excluded_nodes(user):
    job = user.shell(f"cd {user.folder} && sbatch --parsable --requeue --exclude=n4 --wrap 'sleep 60'").stdout.strip()
    user.shell(f"until squeue -h -j {job} -t R | grep -q .; do sleep 0.1; done")
    call = (
        "from datetime import timedelta; from elastic_hpc.slurm import requeue\n"
        f"print(requeue('{job}', start_after=timedelta(seconds=8), exclude=['n1']))"
    )
    done = user.cluster.exec(["env", f"PYTHONPATH={ROOT}", sys.executable, "-c", call])
    assert done.stdout == "None\n"
    user.shell(f"for i in $(seq 300); do squeue -h -j {job} -t R | grep -q . && break; sleep 0.1; done")
    shown = user.shell(f"scontrol show job {job}; scancel {job}").stdout
    assert re.search(r"ExcNodeList=(n1,n4|n\[1,4\])\n", shown)
    assert "JobState=RUNNING" in shown
    assert "Restarts=1" in shown
