"""Options given in Python: their conversion, and refused values."""

from __future__ import annotations

import enum
import os
import re
from datetime import date, datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest

from elastic_hpc import JobSpec, LaunchConfig, UsageError, elastic_launch, render
from elastic_hpc.job import typed as types
from elastic_hpc.options.of_joiners import JOINERS
from elastic_hpc.options.sbatch import COMMAND_LINE_ONLY, REFUSED, SBATCH
from elastic_hpc.options.table import ELASTIC, IN_ALLOCATION
from elastic_hpc.options.torchrun import OPTIONS
from elastic_hpc.options.values import HangTimeout


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "ELASTIC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text("pass")
    return tmp_path


def of(*args: object, **options: object) -> JobSpec:
    return JobSpec.of("train.py", *args, **{"nodes": 1, **options})  # type: ignore[arg-type]


def directives(**options: object) -> list[str]:
    """The script's options for sbatch, without those of every job."""
    return re.findall(r"^#SBATCH --(.*\S) +# Python$", render(of(**options)), re.MULTILINE)


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        *((4, "4:4"), ("4:8", "4:8"), ("4-8", "4:8"), ((4, 8), "4:8"), ((4, 6, 8), "4,6,8"), ([4, 6, 8], "4,6,8")),
        *((range(4, 9), "4:8"), (range(4, 9, 2), "4,6,8"), (range(4, 5), "4:4"), (range(8, 3, -2), "4,6,8")),
        *((range(4, 9, 4), "4,8"), (np.int64(4), "4:4"), ((np.int32(2), 4), "2:4"), ((4,), "4:4")),
    ],
)
def test_nodes_are_a_number_a_pair_exact_numbers_or_a_range(nodes, expected):
    assert str(of(nodes=nodes).launch.nodes) == expected
    assert str(of(nodes=None, nnodes=nodes).launch.nodes) == expected


@pytest.mark.parametrize("nodes", [[4, 8], True, 4.5, (), [], range(0), b"4", {4: 8}, object(), (8, 4), (0, 2), "x"])
def test_ambiguous_or_invalid_nodes_are_refused(nodes):
    with pytest.raises(UsageError, match="nodes"):
        of(nodes=nodes)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"time": timedelta(hours=8)}, "time=08:00:00"),
        ({"time": timedelta(days=2, seconds=0.5)}, "time=2-00:00:01"),
        ({"time": 60}, "time=60"),
        ({"time_min": timedelta(minutes=90)}, "time-min=01:30:00"),
        ({"begin": timedelta(hours=1)}, "begin=now+3600"),
        ({"begin": datetime(2027, 1, 2, 3, 4, 5)}, "begin=2027-01-02T03:04:05"),  # noqa: DTZ001 - local, as Slurm's
        ({"deadline": date(2027, 1, 2)}, "deadline=2027-01-02"),
        ({"exclude": ["n1", "n2"]}, "exclude=n1,n2"),
        ({"nodelist": ("n[1-2]", "n4")}, "nodelist=n[1-2],n4"),
        ({"mail_type": {"FAIL", "END"}}, "mail-type=END,FAIL"),
        ({"array": range(8)}, "array=0-7"),
        ({"array": range(0, 9, 4)}, "array=0-8:4"),
        ({"array": [1, 3]}, "array=1,3"),
        ({"mem": 16}, "mem=16"),
        ({"mem": 16.0}, "mem=16"),
        ({"cpus_per_task": np.int64(8)}, "cpus-per-task=8"),
        ({"output": Path("a/b.log")}, "output=a/b.log"),
        ({"exclusive": True}, "exclusive"),
        ({"exclusive": "user"}, "exclusive=user"),
        ({"hold": True}, "hold"),
        ({"partition": enum.Enum("P", {"GPU": "gpu"}).GPU}, "partition=gpu"),
        ({"sbatch": {"new-option": "x"}}, "new-option=x"),
        ({"sbatch": {"new_switch": True}}, "new-switch"),
        ({"sbatch": {"partition": "gpu"}}, "partition=gpu"),
    ],
)
def test_sbatchs_options_are_written_in_sbatchs_notation(options, expected):
    (found,) = directives(**options)
    assert found.replace('"', "") == expected


def test_a_time_with_a_time_zone_is_converted_to_local_time():
    moment = datetime(2027, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
    assert directives(begin=moment) == [f"begin={moment.astimezone().replace(tzinfo=None).isoformat()}"]


def test_false_overrides_the_value_of_a_file_and_none_does_not():
    Path("elastic_hpc.toml").write_text("[sbatch]\nexclusive = true\n")
    assert of(exclusive=None).has("exclusive")
    assert not of(exclusive=False).has("exclusive")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_restart": 5}, "max_restart: unknown option; did you mean max_restarts?"),
        ({"partitoin": "gpu"}, "did you mean partition.*sbatch={'partitoin': ...}"),
        ({"mem": 16.5}, "mem=16.5: expected a whole number"),
        ({"mem": float("nan")}, "mem=nan: expected a whole number"),
        ({"mem": b"16G"}, "mem=b'16G': expected a string or a number"),
        ({"mem": True}, "mem=True: expected a string or a number"),
        ({"constraint": ["a", "b"]}, r"constraint=\['a', 'b'\]: expected a string or a number"),
        ({"exclude": [["n1"]]}, r"exclude=\['n1'\]: expected a string or a number"),
        ({"exclude": []}, r"exclude=\[\]: expected a string or a number"),
        ({"hold": "yes"}, "hold='yes': expected True or False"),
        ({"partition": False}, "partition=False: expected a string or a number"),
        ({"cpus_per_task": timedelta(1)}, "cpus_per_task=.*expected"),
        ({"time": timedelta(0)}, "time=.*expected a time above 0"),
        ({"parsable": True}, "parsable: belongs on sbatch's command line"),
        ({"max_restarts": True}, "max_restarts=True: expected a string or a number"),
        ({"max_restarts": 2.5}, "--max-restarts '2.5': expected a whole number"),
        ({"max_restarts": timedelta(1)}, "max_restarts=.*expected"),
        ({"grow": 1}, "--grow '1': expected on or off"),
        ({"grace": object()}, "grace=<object.*expected a string or a number"),
        ({"env": "A=1"}, "env='A=1': expected a dict"),
        ({"env": {"A": True}}, "env A True: expected a string, a number or a Path"),
        ({"env": {"A=B": 1}}, "env 'A=B': expected the name of a variable"),
        ({"env": {1: 2}}, "env 1: expected the name of a variable"),
        ({"env": False}, "env=False: expected a dict"),
        ({"env": {"A": "x\0y"}}, "env A .*without a NUL"),
        ({"chdir": "x\0y"}, "chdir.*without a NUL"),
        *(({"setup": lines}, "setup=.*expected a line, or several") for lines in ([None], True, 5, b"x", {})),
        ({"sbatch": ["nice"]}, r"sbatch=\['nice'\]: expected a dict"),
        ({"sbatch": {1: 2}}, "sbatch={1: 2}: expected a dict"),
        ({"module": np.zeros(2)}, "module=.*expected True or False"),
        ({"no_python": "yes"}, "no_python='yes': expected True or False"),
        ({"sbatch": {"max_restarts": 5}}, "sbatch 'max_restarts': is elastic-sbatch's own option, write max_restarts="),
        ({"node_rank": 3}, "--node-rank 3: one command starts"),
        ({"no_python": True, "module": True}, "--no-python with --module"),
    ],
)
def test_values_that_no_command_line_could_have_are_refused_immediately(options, message):
    with pytest.raises(UsageError, match=message):
        of(**options)
    with pytest.raises(ValueError, match=message):  # as Python's own functions do
        of(**options)


def test_a_text_is_one_setup_line_and_values_of_the_environment_become_text():
    job = of(setup="module load cuda", env={"A": 1, "B": Path("x"), "C": None, "D": 0.5})
    assert [line.value for line in job.setup] == ["module load cuda"]
    assert {name: value.value for name, value in job.env.items()} == {"A": "1", "B": "x", "D": "0.5"}


def test_the_script_and_its_arguments_are_converted_to_text_immediately():
    job = JobSpec.of(Path("train.py"), "--epochs", 2, 1e-3, Path("data"), np.float32(0.5), nodes=1)
    assert (job.launch.script, job.launch.script_args) == ("train.py", ("--epochs", "2", "0.001", "data", "0.5"))
    for wrong in (None, True, b"x", ["a"], object()):
        with pytest.raises(UsageError, match=r"argument of the script .*: expected a string, a number or a Path"):
            of(wrong)
    with pytest.raises(UsageError, match=r"script b'train\.py': expected a string"):
        JobSpec.of(b"train.py", nodes=1)  # type: ignore[arg-type]


def test_our_options_accept_pythons_types():
    launch = of(
        grow=True, grace=timedelta(minutes=5), heartbeat_timeout=2.5, hang_timeout="10m", preload=["torch", "numpy"],
        rdzv_conf={"join_timeout": timedelta(minutes=1), "last_call_timeout": 5}, max_restarts=np.int64(3),
        nproc_per_node=8.0, python=["python3", "-X", "dev"],
    ).launch  # fmt: skip
    assert (launch.grow, launch.grace, launch.heartbeat_timeout) == (True, timedelta(minutes=5), timedelta(seconds=2.5))
    assert (launch.hang_timeout, launch.preload.modules) == (
        HangTimeout(timedelta(minutes=10), learns=False),
        ("torch", "numpy"),
    )
    assert str(launch.rdzv_conf) == "join_timeout=60,last_call_timeout=5"
    assert (launch.max_restarts, launch.nproc_per_node) == (3, "8")
    assert of(preload=False).launch.preload.modules == ()
    assert of(python=["my python", "-O"]).agent_python == ("my python", "-O")


def test_torchruns_names_are_accepted():
    job = of(nodes=None, nnodes="2:4", rdzv_backend="c10d", master_addr="n1", master_port=29501, monitor_interval=0.5)
    assert (str(job.launch.nodes), str(job.launch.rdzv_endpoint)) == ("2:4", "n1:29501")


def test_sbatch_lines_of_the_script_apply_as_for_the_command():
    Path("train.py").write_text("#!/usr/bin/env python3\n#SBATCH --partition=gpu\npass\n")
    assert of().has("partition")
    assert directives(partition="other") == ["partition=other"]


def test_a_launch_accepts_the_same_values():
    config = LaunchConfig(local=2, nodes=(1, 2), grace=timedelta(minutes=1), log_dir=Path("x"), rdzv_backend="c10d")  # type: ignore[call-arg]
    assert (config.options, config.log_dir) == (["--nodes=1:2", "--grace=60"], Path("x").absolute())
    assert "--local=2" in LaunchConfig(local=np.int64(2)).command(Path("x"), "train.py")
    for entrypoint in (None, 1, b"train.py", ["train.py"]):
        with pytest.raises(UsageError, match="entrypoint"):
            elastic_launch(config, entrypoint)  # type: ignore[arg-type]
    for options, message in (
        ({"max_restart": 1}, "did you mean max_restarts"),
        ({"partition": "gpu"}, "partition: is no option of elastic_launch"),
        ({"max_requeues": 3}, "max_requeues: is no option of elastic_launch"),
        ({"local": True}, "local=True: expected a number of agents"),
        ({"grace": "soon"}, "--grace 'soon': expected a time"),
    ):
        with pytest.raises(UsageError, match=message):
            LaunchConfig(**options)  # type: ignore[arg-type]


def test_the_typed_options_have_the_same_names_as_the_tables():
    def names(kind: type) -> set[str]:
        return {name.replace("_", "-") for name in kind.__annotations__}

    assert names(types.LaunchOptions) == {option.name for option in IN_ALLOCATION}
    assert names(types.JobOptions) >= set(ELASTIC) - {"setup", "env"}
    assert names(types.TorchrunOptions) == {o.name for o in OPTIONS} - set(ELASTIC) - {"module", "no-python"}
    assert names(types.JoinerOptions) <= JOINERS.keys()
    always = REFUSED.keys() - {"ntasks", "ntasks-per-node", "tasks-per-node"}
    assert names(types.SbatchOptions) == SBATCH.keys() - COMMAND_LINE_ONLY - always - {"nodes"}
