"""Options of sbatch for joiners, --grow-NAME, from all their sources to the joiner's own sbatch."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import submitit
from test_cli_sbatch import Project, main, project
from test_joining import HOUR, PARENT, Fake, fake
from test_slurm import CONFIG, PARTITIONS

from elastic_hpc.cli.srun import main as srun
from elastic_hpc.errors import UsageError
from elastic_hpc.job.script import render
from elastic_hpc.job.spec import JobSpec

__all__ = ["fake", "project"]  # fixtures

CHEAP = ["-N", "2:8", "-p", "gpu", "--grow", "--grow-partition=cheap", "--grow-time", "4:00:00"]


def lines(script: str, mark: str = "GROW") -> list[str]:
    return [
        line.split(" # ")[0].split(" ", 1)[1].strip() for line in script.splitlines() if line.startswith(f"#{mark}")
    ]


def submitted(project: Project, *argv: str) -> str:
    assert main([*argv, "train.py"]) == 0
    script: str = project.seen("script")
    return script


def test_the_options_of_joiners_are_in_the_script_and_do_not_apply_to_the_job_itself(project: Project) -> None:
    script = submitted(project, *CHEAP, "--grow-constraint", "a100 | h100")
    assert lines(script) == ["--partition=cheap", "--time=4:00:00", '--constraint="a100 | h100"']
    assert {"--partition=gpu", "--nodes=2"} <= set(lines(script, "SBATCH"))
    assert not [line for line in lines(script, "SBATCH") if "time" in line or "constraint" in line]


@pytest.mark.parametrize(
    ("option", "nodes"),
    [("partition", "2"), ("qos", "2"), ("account", "2"), ("time=30", "2-8"), ("constraint", "2-8")],
)
def test_the_job_itself_gets_only_min_nodes_only_if_joiners_run_in_another_partition_or_account(
    project: Project, option: str, nodes: str
) -> None:
    script = submitted(project, "-N", "2:8", "--grow", f"--grow-{option if '=' in option else option + '=x'}")
    assert f"--nodes={nodes}" in lines(script, "SBATCH")


def test_a_file_has_a_table_for_joiners_and_the_command_line_takes_precedence(project: Project) -> None:
    text = "[grow]\non = true\nevery = '5m'\npartition = 'cheap'\nqos = 'low'\nexclusive = true\nnice = 100\n"
    (project.folder / "elastic_hpc.toml").write_text(text)
    script = submitted(project, "-N", "2:8", "--grow-qos=lower")
    assert " --grow on --grow-every 300 " in project.agents()
    assert lines(script) == ["--partition=cheap", "--exclusive", "--nice=100", "--qos=lower"]
    (project.folder / "elastic_hpc.toml").write_text("grow = true\ngrow_partition = 'cheap'\ngrow-nice = false\n")
    assert lines(submitted(project, "-N", "2:8")) == ["--partition=cheap"]


def test_a_files_options_for_joiners_do_not_apply_to_a_job_that_does_not_grow(project: Project) -> None:
    (project.folder / "elastic_hpc.toml").write_text("[grow]\npartition = 'cheap'\n")
    script = submitted(project, "-N", "2:8")
    assert lines(script) == []
    assert "--nodes=2-8" in lines(script, "SBATCH")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--grow-partition=x"],
            "--grow-partition=x: is for the jobs that --grow submits; add --grow, or leave it out",
        ),
        (["--grow=off", "--grow-qos=x"], "--grow-qos=x: is for the jobs that --grow submits; add --grow"),
        (["--grow", "--grow-nodes=2"], "--grow-nodes=2: a joiner has one node; use --nodes MIN:MAX"),
        (["--grow", "--grow-gpus=2"], "--grow-gpus=2: it counts the GPUs of all nodes, and a joiner has one node; use"),
        (["--grow", "--grow-exclude=n1"], "--grow-exclude=n1: joiners get no node that --exclude names; use --exclude"),
        (["--grow", "--grow-signal=USR1"], "--grow-signal=USR1: a joiner is one more node of the job, which decides"),
        (["--grow", "--grow-ntasks-per-node=2"], "--grow-ntasks-per-node=2: a joiner is one more node of the job"),
        (["--grow", "--grow-container=x"], "--grow-container=x: a joiner is one more node of the job"),
        (["--grow", "--grow-part=x"], "--grow-part: unknown option; did you mean --grow-partition?"),
        (
            ["--grow", "--grow-time=2"],
            "--grow-time=2: Slurm warns the job 120 s before its end (--grace 90 s plus 30 s)",
        ),
        (["--template=torchrun", "--grow-qos=x"], "--grow-qos=x: is for the jobs that --grow submits"),
    ],
)
def test_options_that_joiners_cannot_have_are_refused(
    project: Project, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert main(["-N", "2:8", *argv, "train.py"]) == 2
    assert capsys.readouterr().err.startswith(f"elastic-sbatch: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[grow]\npartitoin = 'x'",
            "grow-partitoin: unknown option of sbatch for joiners, did you mean grow-partition",
        ),
        ("grow-evry = 5", "grow-evry: unknown option of sbatch for joiners, did you mean grow-every"),
        ("grow-every = 5\n[grow]\nevery = 5", r"\[grow\] every: grow-every is set too"),
        ("[grow]\nnodes = 2", "--grow-nodes=2: a joiner has one node"),
        ("[grow]\non = 3", "grow = 3: expected true or false"),
        ("[grow]\npartition = true", "grow-partition = true: expected a string or a number"),
    ],
)
def test_a_mistake_in_the_table_is_reported(
    project: Project, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (project.folder / "elastic_hpc.toml").write_text(text)
    assert main(["-N", "2:8", "train.py"]) == 2
    assert re.search(rf"configuration file \./elastic_hpc\.toml: {message}", capsys.readouterr().err)


def test_a_template_without_the_lines_for_joiners_is_refused(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    (project.folder / "my.j2").write_text("#!/bin/bash\n# ELASTIC_HPC_JOIN\n")
    assert main(["--template", "my.j2", *CHEAP, "train.py"]) == 2
    assert (
        "--template my.j2 with --grow-partition: it has no #GROW lines; include directives.j2"
        in capsys.readouterr().err
    )


def test_options_for_joiners_are_given_in_python_like_options_of_sbatch(project: Project) -> None:
    options: dict[str, Any] = {"grow_partition": ["a", "b"], "grow_time": timedelta(hours=2), "grow_nice": 5}
    job = JobSpec.of("train.py", nodes=(2, 8), grow=True, sbatch={"grow-newer": "x"}, **options)
    assert lines(render(job)) == ["--partition=a,b", "--time=02:00:00", "--nice=5", "--newer=x"]
    with pytest.raises(UsageError, match="did you mean grow_partition"):
        JobSpec.of("train.py", nodes=(2, 8), grow=True, grow_partitoin="x")  # type: ignore[call-arg]


def test_options_for_joiners_are_parameters_of_submitits_executors(project: Project) -> None:
    executor = submitit.AutoExecutor("jobs", cluster="elastic")
    executor.update_parameters(elastic_nodes="2:8", elastic_grow=True, elastic_grow_partition="cheap")
    executor.submit(print)
    assert lines(project.seen("script")) == ["--partition=cheap"]


def test_elastic_srun_reports_that_it_does_not_grow(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert srun(["--local", "2", "--grow-partition", "cheap", "train.py"]) == 2
    assert "--grow-partition=cheap: is for jobs that elastic-sbatch submits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("limit", "asked", "time"),
    [("01:00:00", "10", "10"), ("01:00:00", "2:00:00", "30"), ("UNLIMITED", "1-0", "1440"), ("01:00:00", None, "30")],
)
def test_a_joiner_has_the_options_of_its_lines_and_at_most_the_remaining_time_of_the_job(
    fake: Fake, tmp_path: Path, limit: str, asked: str | None, time: str
) -> None:
    fake.tell("scontrol", PARENT.format(**{**HOUR, "limit": limit, "qos": "normal"}))
    script = (
        '#!/bin/bash\n#SBATCH --constraint=x --qos=normal\n#GROW --partition=cheap # why\n#GROW --constraint="a & b"\n'
    )
    fake.submit(script + (f"#GROW --time={asked}\n" if asked else "") + "true\n#GROW --hold\n")
    options = fake.said("options")
    assert [option for option in options if option.startswith("--time=")] == [f"--time={time}"]
    chosen = {name: value for name, _, value in (option.partition("=") for option in options)}  # the last option counts
    assert (chosen["--partition"], chosen["--qos"], chosen["--constraint"]) == ("cheap", "normal", "a & b")
    assert "--hold" not in options


def test_the_user_is_warned_if_joiners_have_less_time_at_a_preemption_than_the_grace(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    (project.recorded / "partition").write_text(PARTITIONS.replace("GraceTime=90", "GraceTime=20"))
    scontrol = project.recorded / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/sh\ncat {project.recorded}/"$2"\n')
    scontrol.chmod(0o755)
    for settings, warnings in (("enable_configless,preempt_send_user_signal", 0), ("", 1)):
        text = CONFIG.replace("enable_configless,preempt_send_user_signal", settings or "(null)")
        (project.recorded / "config").write_text(text.replace("JobRequeue              = 0", "JobRequeue = 1"))
        submitted(project, "-N", "2:8", "-p", "main", "--grow", "--grow-partition=low")
        told = "a preempted joiner has 20 s here (GraceTime), less than --grace 90: save often enough"
        assert capsys.readouterr().err.count(told) == warnings
