"""The environment of agents and workers: interpreter, set-up lines, containers. Neither pyxis nor apptainer is
installed: the tests compare the script's options with the manuals.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import simulated
from cluster import wait_for
from test_joiners import no_dial

from elastic_hpc.agent.arguments import parse_args
from elastic_hpc.agent.leading import Leading
from elastic_hpc.cli.sbatch import main
from elastic_hpc.errors import JobEnded, UsageError
from elastic_hpc.job.quoting import quote_all
from elastic_hpc.job.script import render
from elastic_hpc.job.spec import JobSpec
from elastic_hpc.job.submission import checked
from elastic_hpc.membership.promises import Promises
from elastic_hpc.membership.roster import Host
from elastic_hpc.options.spec import LaunchSpec
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.slurm.env import AgentEnv
from elastic_hpc.start import module_command

PYXIS = {"container_image": "registry.example#nvidia/pytorch:25.01-py3"}
APPTAINER = {"container_image": "train.sif"}
OCI = {"container_image": "bundle", "container_runtime": "oci"}


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "ELASTIC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    folder = tmp_path / "it's } mine"
    folder.mkdir()
    (folder / "train.py").write_text("pass")
    monkeypatch.chdir(folder)
    return folder


def of(**options: object) -> JobSpec:
    return JobSpec.of("train.py", "a b", nodes="2:4", **options)


def srun_argv(spec: JobSpec) -> list[str]:
    """The arguments of srun on the batch host, in the project's folder."""
    node = Path("node")
    node.mkdir(exist_ok=True)
    for name, text in {"srun": "printf '%s\\0' \"$@\" > node/argv", "scontrol": "echo n1; echo n2"}.items():
        (node / name).write_text(f"#!/bin/sh\n{text}\n")
        (node / name).chmod(0o755)
    (node / "script").write_text(render(spec).partition("\nexec ")[0])
    environ = {
        "PATH": f"{node.absolute()}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "4",
        "SLURM_JOB_NODELIST": "n[1-4]",
    }  # fmt: skip
    subprocess.run(["bash", node / "script"], env=environ, check=True, timeout=30)
    return os.fsdecode((node / "argv").read_bytes()).split("\0")[:-1]


def ours(argv: list[str]) -> list[str]:
    """The arguments between the options of every job and the agent's own options."""
    first = argv.index("--cpu-bind=none") + 1
    return argv[first : argv.index("elastic_hpc.agent") + 1]


def test_pyxis_gets_options_of_the_srun_line_and_the_batch_script_stays_outside(project: Path) -> None:
    spec = of(**PYXIS, container_mounts="/da ta:/data:ro,/scratch:/scratch", env={"B": "1", "A": "2"})
    run_dir = f"{project}/elastic-logs/7"
    assert ours(srun_argv(spec)) == [
        "--container-image=registry.example#nvidia/pytorch:25.01-py3",
        f"--container-mounts={project}:{project},{run_dir}:{run_dir},/da ta:/data:ro,/scratch:/scratch",
        f"--container-workdir={project}",
        "--container-env=B,A",
        *module_command("python3", "elastic_hpc.agent", unbuffered=True),
    ]  # fmt: skip
    script = render(spec)
    assert not re.search(r"^#SBATCH.*container", script, re.MULTILINE)
    for does in "conclude", "warned":
        assert quote_all(module_command(sys.executable, "elastic_hpc", does)) in script.replace("\n    ", "\n  ")


def test_the_command_is_apptainer_which_mounts_the_folders_that_the_agent_needs(project: Path) -> None:
    spec = of(**APPTAINER, container_mounts="/data:/data:ro", env={"A": "x y"}, python="/opt/venv/bin/python")
    assert ours(srun_argv(spec)) == [
        "apptainer", "exec",
        "--bind", f"{project}:{project},{project}/elastic-logs/7:{project}/elastic-logs/7,/data:/data:ro",
        "--pwd", str(project),
        "train.sif", *module_command("/opt/venv/bin/python", "elastic_hpc.agent", unbuffered=True),
    ]  # fmt: skip
    assert "export A='x y'\nexport APPTAINERENV_A=\"$A\"  #" in render(spec)


def test_an_oci_bundle_is_an_option_of_srun_and_env_sets_the_variables_of_its_config(project: Path) -> None:
    spec = of(**OCI, env={"A": "x y"}, python="/opt/venv/bin/python")
    assert ours(srun_argv(spec)) == [
        f"--container={project}/bundle",
        "env", f"--chdir={project}", "A=x y",
        *module_command("/opt/venv/bin/python", "elastic_hpc.agent", unbuffered=True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "nv"),
    [
        ({}, False), ({"gres": "nvme:1"}, False), ({"gres": "gpu:a100:2"}, True), ({"gpus_per_node": 2}, True),
        ({"gpus": 8}, True),
    ],
)  # fmt: skip
def test_apptainer_sees_the_requested_gpus(options: dict[str, Any], *, nv: bool) -> None:
    assert ("--nv" in srun_argv(of(**APPTAINER, **options))) == nv
    assert "--nv" not in srun_argv(of(**PYXIS, **options))


def test_the_agent_in_a_container_knows_that_it_is_in_one() -> None:
    for options, contained in (PYXIS, True), (APPTAINER, True), (OCI, True), ({}, False):
        argv = srun_argv(of(**options))
        words = argv[argv.index("elastic_hpc.agent") + 1 :]
        assert parse_args(words)[1].contained == contained
        assert words[-3:] == ["--", "train.py", "a b"]


@pytest.mark.parametrize(
    ("image", "options", "runtime"),
    [
        ("a.sif", {}, "apptainer"),
        ("a.sif", {"container_runtime": "pyxis"}, "pyxis"),
        ("ubuntu", {}, "pyxis"),
        ("/images/a.sqsh", {}, "pyxis"),
        ("docker://a", {"container_runtime": "apptainer"}, "apptainer"),
    ],
)
def test_the_image_determines_the_container_runtime_unless_the_user_chooses_one(
    image: str, options: dict[str, str], runtime: str
) -> None:
    container = of(container_image=image, **options).container
    assert container
    assert container.runtime == runtime


def test_an_image_file_is_found_from_any_folder(project: Path) -> None:
    (project / "train.sif").write_text("")
    container = of(**APPTAINER).container
    assert container
    assert container.image == str(project / "train.sif")


def test_plain_torchrun_runs_in_a_container_too_and_has_no_run_directory(project: Path) -> None:
    argv = srun_argv(of(**PYXIS, template="torchrun"))
    assert f"--container-mounts={project}:{project}" in argv
    assert argv[argv.index("torch.distributed.run") - 4] == "python3"
    argv = srun_argv(of(**APPTAINER, template="torchrun", python="python3.11"))
    assert argv[argv.index("apptainer") :][:8] == [
        "apptainer", "exec", "--bind", f"{project}:{project}", "--pwd", str(project), "train.sif", "env",
    ]  # fmt: skip
    assert argv[argv.index("torch.distributed.run") - 4] == "python3.11"


def test_a_users_template_has_the_container_in_its_lists_of_words(project: Path) -> None:
    (project / "my.j2").write_text("#!/bin/bash\n{{ srun_options|quote_all }}\n{{ agent_command|quote_all }}\n")
    text = render(of(**APPTAINER, template="./my.j2"))
    agent = "train.sif env PYTHONSAFEPATH=1 python3 "
    assert f'\napptainer exec --bind "$PWD:$PWD,$run_dir:$run_dir" --pwd "$PWD" {agent}' in text


@pytest.mark.parametrize("options", [PYXIS, APPTAINER, OCI])
@pytest.mark.parametrize("template", ["elastic", "torchrun"])
def test_scripts_with_containers_are_clean(project: Path, options: dict[str, str], template: str) -> None:
    extra = {
        "setup": ["true", "a=1\nb=2"],
        "env": {"A": "b\nc"},
        **({} if options is OCI else {"container_mounts": "/it's:/b"}),
    }
    (project / "script").write_text(render(of(**options, **extra, template=template)))
    subprocess.run(["bash", "-n", "script"], check=True)
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", "-e", "SC2034", "script"], check=True)  # the set-up lines' own variables


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"container_mounts": "/a:/a"}, r"--container-mounts: has no effect without --container-image; add that"),
        ({"container_runtime": "pyxis"}, r"--container-runtime: has no effect without --container-image"),
        ({**PYXIS, "container_mounts": "/a"}, r"--container-mounts '/a': expected SRC:DST\[:FLAGS\]"),
        ({**PYXIS, "container_mounts": "/a:/b,"}, r"--container-mounts '/a:/b,': expected"),
        ({**PYXIS, "container_runtime": "docker"}, "--container-runtime 'docker': expected pyxis, apptainer or oci"),
        ({**OCI, "container_mounts": "/a:/a"}, "--container-mounts /a:/a with --container-runtime oci: .* config.json"),
        ({"container_image": ""}, "--container-image '': expected an image"),
        ({**PYXIS, "log_dir": "a,b"}, "a,b['\"] with --container-image: a folder with a comma"),
        ({**PYXIS, "grow": True}, "--grow with --container-image: .* leave out --grow, or write --grow=off"),
        ({"python": ""}, "--python '': expected a Python interpreter"),
    ],
)
def test_options_that_cannot_work_in_a_container_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        checked(of(**options))


@pytest.mark.parametrize(
    "option",
    [
        "--container=oci", "--container-id=x", "--container-name=x", "--container-writable",
        "--no-container-mount-home", "--container-workdir=/x", "--container-im=x", "--contai=x",
    ],
)  # fmt: skip
def test_options_that_would_put_the_batch_script_into_a_container_are_refused(
    option: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--dry-run", "-N1", option, "train.py"]) == 2
    expected = f"elastic-sbatch: {option} (command line): it would put the batch script itself into a container"
    assert capsys.readouterr().err.startswith(expected)
    key, _, value = option.removeprefix("--").partition("=")
    (project / "elastic_hpc.toml").write_text(f"[sbatch]\n{key} = {repr(value) if value else 'true'}\n")
    assert main(["--dry-run", "-N1", "train.py"]) == 2


def test_a_site_file_may_configure_containers_without_requesting_one(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "container-runtime = 'apptainer'\ncontainer-mounts = '/data:/data'\npython = '/usr/bin/python3'\n"
    (project / "elastic_hpc.toml").write_text(text)
    assert main(["--dry-run", "-N1", "train.py"]) == 0
    assert "apptainer" not in capsys.readouterr().out
    assert main(["--dry-run", "-N1", "--container-image=a", "train.py"]) == 0
    out = capsys.readouterr().out
    assert ",/data:/data --pwd" in out
    assert re.search(r"^# --container-runtime +apptainer +\./elastic_hpc\.toml$", out, re.MULTILINE)
    assert re.search(r"^# --python +/usr/bin/python3 +\./elastic_hpc\.toml$", out, re.MULTILINE)


def test_agents_have_the_interpreter_of_the_submission_unless_another_is_named() -> None:
    assert ours(srun_argv(of())) == module_command(sys.executable, "elastic_hpc.agent", unbuffered=True)
    assert ours(srun_argv(of(python="python"))) == module_command("python", "elastic_hpc.agent", unbuffered=True)
    assert quote_all(module_command(sys.executable, "elastic_hpc", "conclude")) in render(of(python="python"))
    assert ours(srun_argv(of(python="~/bin/python")))[2] == os.path.expanduser("~/bin/python")


def test_a_failing_setup_line_is_reported_and_the_job_continues(project: Path) -> None:
    spec = of(setup=["true", "sh -c 'exit 3'\n[ it = \"it's\" ]", 'export A="1 2"'])
    script = render(spec).replace("\nsrun ", '\nprintf "A is %s" "$A"; exit #')
    done = subprocess.run(
        ["bash", "-c", script], env={"PATH": os.environ["PATH"], "SLURM_JOB_ID": "7"},
        text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert "elastic_hpc: exit code 1 of --setup sh -c 'exit 3'\n[ it = \"it's\" ]\n" in done.stderr
    assert done.stderr.count("elastic_hpc: ") == 1
    assert done.stdout == "A is 1 2"


@pytest.mark.parametrize(
    ("lines", "code", "said"),
    [
        (["set -euo pipefail", "modul load a"], 127, "exit code 127: the batch script ended in --setup modul load a"),
        (["set -u", "X=$NONE"], 1, "exit code 1: the batch script ended in --setup X=$NONE"),
        (["true; sh -c 'exit 3' || exit 4"], 4, "exit code 4: the batch script ended in --setup true; sh -c 'exit 3'"),
        (
            ["(exit 3)", "trap 'echo elastic_hpc: mine >&2' EXIT", "set -e", "false"],
            1,
            "exit code 3 of --setup (exit 3)",
        ),
        (["set -e"], 5, ""),
        (["true", "kill -TERM $$; sleep 9"], -15, ""),
    ],
)
def test_a_set_up_line_that_ends_the_script_is_named(project: Path, lines: list[str], code: int, said: str) -> None:
    script = render(of(setup=lines)).replace("\nsrun ", "\nexit 5 #")
    (project / "elastic.sh").write_text(script)
    done = subprocess.run(
        ["bash", "elastic.sh"], env={"PATH": os.environ["PATH"], "SLURM_JOB_ID": "7"},
        text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == code
    assert f"elastic_hpc: {said}" in done.stderr if said else "elastic_hpc:" not in done.stderr
    assert "elastic_hpc: mine\n" in done.stderr or "trap" not in "".join(lines)


def test_a_users_template_keeps_its_own_exit_trap_over_the_set_up_lines(project: Path) -> None:
    script = render(of(setup=["true"])).replace("\n# --setup", "\ntrap 'echo \"it is\" mine' EXIT\n# --setup", 1)
    script = script.replace("\nsrun ", '\nprintf %s "$ELASTIC_HPC_RUN_DIR"; exit 5 #')
    done = subprocess.run(
        ["bash", "-c", script], env={"PATH": os.environ["PATH"], "SLURM_JOB_ID": "7"},
        text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (5, f"{project}/elastic-logs/7it is mine\n")
    assert "elastic_hpc: " not in done.stderr


# an agent without Slurm's commands


async def no_store(round: int) -> int:
    raise AssertionError(f"nobody forms round {round}")


def leading(rundir: RunDir) -> Leading:
    env = AgentEnv("7", 1, "n2", 2, 0, 2, None, None, local=False)
    policy = replace(simulated.POLICY, heartbeat_timeout=0.05)
    spec = LaunchSpec.from_namespace(argparse.Namespace(script="t.py"))
    host = Host(1, "n2", ("10.0.0.2",), 29432, "torch 2")
    return Leading(spec, env, host, 1, policy, rundir, {}, no_store, no_dial, contained=True)


def test_a_leader_without_slurms_commands_requests_no_nodes_and_leaves_requeues_to_the_batch_script(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    caplog.set_level("INFO", "elastic_hpc")
    agent = leading(RunDir(tmp_path))
    server = agent.lead(Promises(), "")
    assert server._supply is None
    assert agent._ending.act({"outcome": "requeue"}, ["n3"], alone=False, others=()) is None
    assert [record.getMessage() for record in caplog.records if record.name == "elastic_hpc.agent.leading"] == [
        "Slurm's commands are not here: no agent restarts, the job does not grow, the batch script requeues"
    ]
    assert agent.recorder
    agent.recorder.close()


def test_when_the_batch_script_is_lost_too_the_agent_shows_once_what_to_type_and_leaves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    agent = leading(RunDir(tmp_path))
    ended: list[JobEnded | None] = []

    def gives_up() -> bool:
        ended.append(agent.give_up(None, 99.0, "n1 lost", patient=False))
        return ended[-1] is not None

    wait_for(gives_up)
    assert ended[-1]
    assert ended[-1].outcome == "lost"
    assert "type: scontrol requeue 7, or scancel 7" in caplog.text
    assert caplog.text.count("Slurm's commands") == 1
