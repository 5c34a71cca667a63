import getpass
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_hpc.cli.hpc import main as hpc
from elastic_hpc.cli.sbatch import main
from elastic_hpc.record.registry import remembered

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A directory with a script, without configuration files, and a stub of sbatch that records its input."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "ELASTIC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "train.py").write_text("pass")
    monkeypatch.chdir(folder)
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")

    def sbatch(text):
        path = bin_folder / "sbatch"
        path.write_text(f"#!/bin/sh\necho $* > {tmp_path}/argv; env > {tmp_path}/env\n{text}\n")
        path.chmod(0o755)

    sbatch(f"cat > {tmp_path}/script; echo 17")
    return Project(folder, tmp_path, sbatch)


class Project:
    def __init__(self, folder, recorded, sbatch):
        self.folder, self.recorded, self.sbatch = folder, recorded, sbatch

    def seen(self, what):
        """The recorded text; of the script without the last line, which repeats the command line."""
        path = self.recorded / what
        return path.read_text().partition("# elastic-sbatch --resume")[0] if path.exists() else None

    def agents(self):
        """The command that starts the agents, on one line, with their options."""
        script = self.seen("script").replace(" \\\n ", "")
        array = re.search(r"^agent_options=\(\n(.*?)^\)$", script, re.MULTILINE | re.DOTALL)[1]
        options = " ".join(row.partition(" # ")[0].strip() for row in array.splitlines())
        return re.search(r"^srun .*$", script, re.MULTILINE)[0].replace('"${agent_options[@]}"', options)


def test_a_job_is_submitted_and_the_output_is_like_sbatchs(project, capsys):
    assert main(["-N", "2:4", "-p", "gpu", "train.py", "--nodes", "x"]) == 0
    out, err = capsys.readouterr()
    assert out == "Submitted batch job 17\n"
    assert err == f"run directory: {project.folder}/elastic-logs/17; to see the job: elastic-hpc status 17\n"
    assert project.seen("argv") == "--parsable\n"
    assert "#SBATCH --partition=gpu" in project.seen("script")
    assert project.agents().endswith(" -- train.py --nodes x &")
    assert (project.folder / "elastic-logs").is_dir()


def test_the_dry_run_prints_exactly_what_is_submitted_and_submits_nothing(project, capsysbinary):
    argv = ["--nodes", "2:4", "--log-dir", "logs", "train.py", "a b", "\udcff"]
    assert main(["--dry-run", *argv]) == 0
    printed = capsysbinary.readouterr().out
    assert project.seen("script") is None
    assert not (project.folder / "logs").exists()
    assert main(argv) == 0
    assert (project.recorded / "script").read_bytes() == printed


def test_parsable_prints_the_id_alone(project, capsys):
    project.sbatch("cat > /dev/null; echo '17;east'")
    assert main(["--parsable", "-N1", "train.py"]) == 0
    assert capsys.readouterr() == ("17;east\n", "")
    assert main(["-N1", "train.py"]) == 0
    assert capsys.readouterr().out == "Submitted batch job 17 on cluster east\n"


def test_wait_returns_the_jobs_exit_code(project, capsys):
    project.sbatch("cat > /dev/null; echo 17; exit 5")
    assert main(["--wait", "-N1", "train.py"]) == 5
    assert capsys.readouterr().out == "Submitted batch job 17\n"
    assert project.seen("argv") == "--parsable --wait\n"


def test_options_for_sbatch_itself_go_to_its_command_line(project, capsys):
    project.sbatch("cat > /dev/null; echo 'sbatch: Job 3 to start soon' >&2")
    assert main(["--test-only", "-vv", "-Q", "-N1", "train.py"]) == 0
    assert project.seen("argv") == "--parsable --test-only --verbose --verbose\n"
    assert capsys.readouterr() == ("", "sbatch: Job 3 to start soon\n")


def test_a_job_that_was_submitted_quietly_is_known(project, monkeypatch, capsys):
    """With --quiet sbatch prints nothing, not even with --parsable."""
    monkeypatch.setenv("XDG_STATE_HOME", str(project.folder / "state"))
    project.sbatch('cat > /dev/null; case "$*" in *--quiet*) ;; *) echo 17 ;; esac')
    assert main(["-Q", "-N1", "train.py"]) == 0
    assert capsys.readouterr() == ("", "")
    assert remembered() == [Path("elastic-logs", "17").absolute()]


def test_variables_of_slurm_and_of_another_job_do_not_reach_the_submission(project, monkeypatch):
    kept = {"SLURM_CONF", "SLURM_JWT", "KEPT", "SQUEUE_FORMAT"}
    lost = {"SLURM_CPU_BIND", "SLURM_JOBID", "SLURMD_NODENAME", "SRUN_CPUS_PER_TASK", "SALLOC_ACCOUNT", "PMIX_RANK"}
    lost |= {"_SLURM_SPANK_OPTION_pyxis_container_image", "SPANK_X", "PMI_RANK", "SBATCH_CPU_BIND", "SBATCH_COMMENT"}
    lost |= {"ELASTIC_HPC_JOIN", "ELASTIC_HPC_CONTINUE", "ELASTIC_HPC_RUN_DIR", "ELASTIC_HPC_AGENT"}
    for name in kept | lost:
        monkeypatch.setenv(name, "x")
    (project.folder / "site.toml").write_text("")
    monkeypatch.setenv("ELASTIC_HPC_CONFIG", "site.toml")
    assert main(["-N1", "train.py"]) == 0
    names = {line.partition("=")[0] for line in project.seen("env").splitlines()}
    assert kept | {"ELASTIC_HPC_CONFIG"} <= names
    assert not names & lost


def test_sbatch_variables_of_the_environment_rank_below_the_command_line_and_above_the_files(
    project, monkeypatch, capsys
):
    (project.folder / "elastic_hpc.toml").write_text("[sbatch]\naccount = 'of the file'\nqos = 'of_the_file'\n")
    given = {"ACCOUNT": "mine", "PARTITION": "gpu", "TIMELIMIT": "8:00:00", "EXCLUSIVE": "", "REQ_SWITCH": "2"}
    for name, value in {**given, "WAIT4SWITCH": "60", "OVERCOMMIT": "0", "SPREAD_JOB": "yes", "DEBUG": "1"}.items():
        monkeypatch.setenv(f"SBATCH_{name}", value)
    assert main(["-N1", "-p", "cpu", "train.py"]) == 0
    lines = [" ".join(line.split()) for line in project.seen("script").splitlines()]
    for line in (
        "account=mine # environment: SBATCH_ACCOUNT", "qos=of_the_file # ./elastic_hpc.toml",
        "partition=cpu # command line", "time=8:00:00 # environment: SBATCH_TIMELIMIT",
        "exclusive # environment: SBATCH_EXCLUSIVE", "switches=2@60 # environment: SBATCH_REQ_SWITCH",
        "spread-job # environment: SBATCH_SPREAD_JOB",
    ):  # fmt: skip
        assert f"#SBATCH --{line}" in lines
    assert "overcommit" not in project.seen("script")
    assert project.seen("argv") == "--parsable --verbose\n"
    assert capsys.readouterr().err.count("\n") == 1  # the run directory


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("NO_REQUEUE", "1", "--no-requeue: an elastic job comes back through the queue"),
        ("GPUS_PER_TASK", "1", "--gpus-per-task=1: it hides the GPUs of a node's workers"),
        ("EXPORT", "NONE", "--export=NONE: the agents need the environment of the submission"),
        ("OPEN_MODE", "truncate", "--open-mode=truncate: a requeue would wipe the log"),
        ("CONTAINER", "x", "--container=x: use --container-image IMAGE"),
        ("SIGNAL", "TERM@30", "--signal=TERM@30: Slurm or the shell needs SIGTERM itself"),
    ],
)
def test_environment_variables_that_break_an_elastic_job_are_dropped_with_a_message(
    project, monkeypatch, capsys, name, value, reason
):
    monkeypatch.setenv(f"SBATCH_{name}", value)
    assert main(["-N1", "train.py"]) == 0
    note = f"SBATCH_{name} in the environment is not used: {reason}"
    assert f"\nelastic-sbatch: {note}" in capsys.readouterr().err
    assert f"\n# {note}" in project.seen("script")
    assert main(["-N1", "-Q", "train.py"]) == 0
    assert capsys.readouterr().err == ""


def test_the_sbatch_lines_of_a_python_script_rank_below_environment_and_command_line(project, monkeypatch, capsys):
    (project.folder / "elastic_hpc.toml").write_text("[sbatch]\npartition = 'of_the_file'\nqos = 'of_the_file'\n")
    head = "#!/usr/bin/env python\n# x\n#SBATCH -p gpu --nodes=2-4 # why\n##SBATCH --qos=no\n\n#SBATCH --acco='a b'\n"
    (project.folder / "train.py").write_text(f"{head}#SBATCH -t 1:00:00\nimport os\n#SBATCH --qos=late\n")
    monkeypatch.setenv("SBATCH_TIMELIMIT", "2:00:00")
    assert main(["train.py"]) == 0
    lines = [" ".join(line.split()) for line in project.seen("script").splitlines()]
    for line in (
        "--nodes 2:4 # train.py line 3; #SBATCH --nodes must match", "#SBATCH --partition=gpu # train.py line 3",
        '#SBATCH --account="a b" # train.py line 6', "#SBATCH --time=2:00:00 # environment: SBATCH_TIMELIMIT",
        "#SBATCH --qos=of_the_file # ./elastic_hpc.toml",
    ):  # fmt: skip
        assert line in lines
    assert main(["-N1", "-p", "cpu", "train.py"]) == 0
    assert "#SBATCH --partition=cpu " in project.seen("script")
    for line, message in {
        "#SBATCH --ntasks=4": "train.py line 1: --ntasks=4: with a task count Slurm grants only MIN nodes",
        "#SBATCH --nodes=x": "train.py line 1: --nodes 'x': expected",
        "#SBATCH --wait": "train.py line 1: --wait: belongs on the command line",
        "#SBATCH --nonsense": "train.py line 1: --nonsense: unknown option",
        "#SBATCH 'x": 'train.py line 1: "#SBATCH \'x": expected quotes in pairs',
    }.items():
        (project.folder / "train.py").write_text(f"{line}\nimport os\n")
        capsys.readouterr()
        assert main(["-N1", "train.py"]) == 2
        assert capsys.readouterr().err.startswith(f"elastic-sbatch: {message}")


@pytest.mark.parametrize(
    ("option", "folder"),
    [
        ("-o logs/%x/%u/%j.out", "logs/train/{user}"), ("--output=a/b/x", "a/b"), ("-e errors/%A_%a.err", "errors"),
        ("-D sub -o logs/out", "sub/logs"), ("-o a/%j/%x/out", "a"), ("-o here-%j.out", "."), ("-o 50%%/x", "50%"),
    ],
)  # fmt: skip
def test_the_folder_of_the_jobs_output_is_created_because_slurm_would_not_do_it(project, capsys, option, folder):
    (project.folder / "sub").mkdir()
    (project.folder / "sub" / "train.py").write_text("pass")
    place = project.folder / folder.format(user=getpass.getuser())
    assert main(["--dry-run", "-N1", *option.split(), "train.py"]) == 0
    assert place.exists() == (folder == ".")
    capsys.readouterr()
    assert main(["-N1", *option.split(), "train.py"]) == 0
    assert place.is_dir()
    assert ("Slurm makes no folders; the job fails" in capsys.readouterr().err) == ("%j/" in option)


def test_an_output_folder_that_cannot_be_created_is_reported(project, capsys):
    assert main(["-N1", "-o", "train.py/logs/%j.out", "train.py"]) == 0
    assert "--output=train.py/logs/%j.out: " in (said := capsys.readouterr().err)
    assert "train.py is a file" in said


@pytest.mark.parametrize(
    ("prefix", "said", "code"),
    [
        ("/h/.cache/uv/builds-v0/.tmpX1", "elastic-sbatch runs in /h/.cache/uv/builds-v0/.tmpX1, which uv", 2),
        ("/scratch/uv/archive-v0/Ab1", "runs in /scratch/uv/archive-v0/Ab1, a cache, which may be cleaned", 0),
        ("/h/.cache/uv/environments-v2/train-1", "a cache, which may be cleaned", 0),
        ("/home/me/.cache/pipx/0123456789abcde", "a cache, which may be cleaned", 0),
        ("/dev/shm/env", "runs in /dev/shm/env: each node has its own /dev/shm", 0),
        ("/home/me/project/.venv", "", 0), ("/usr", "", 0), ("/opt/pipx/venvs/elastic_hpc", "", 0),
    ],
)  # fmt: skip
def test_an_environment_that_the_job_will_not_find_is_refused_or_reported(
    project, monkeypatch, capsys, prefix, said, code
):
    monkeypatch.setattr(sys, "prefix", prefix)
    assert main(["-N1", "train.py"]) == code
    assert f"elastic-sbatch: {said}" in (err := capsys.readouterr().err) or said in err
    assert bool(said) == ("expected the environment in which you train" in err)


def test_a_temporary_environment_is_accepted_if_the_job_has_another_one(project, monkeypatch, capsys):
    monkeypatch.setattr(sys, "prefix", "/home/me/.cache/uv/builds-v0/.tmpX1")
    assert main(["-N1", "--python", "/shared/venv/bin/python", "train.py"]) == 0
    assert sys.executable not in project.seen("script")
    assert project.seen("script").count("/shared/venv/bin/python ") >= 3
    assert main(["-N1", "--python", "python3", "--container-image", "x.sif", "train.py"]) == 2


def test_inside_a_job_variables_that_slurm_has_set_for_that_job_are_not_options(project, monkeypatch):
    outside = {"SLURM_CLUSTERS": "east", "SLURM_HINT": "nomultithread", "SBATCH_MEM_BIND": "local"}
    for name, value in {**outside, "SBATCH_QOS": "high"}.items():
        monkeypatch.setenv(name, value)
    main(["-N1", "train.py"])
    assert {"clusters", "hint", "mem-bind", "qos"} <= set(re.findall(r"#SBATCH --([\w-]+)", project.seen("script")))
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    main(["-N1", "train.py"])
    named = set(re.findall(r"#SBATCH --([\w-]+)", project.seen("script")))
    assert "qos" in named
    assert not named & {"clusters", "hint", "mem-bind"}


def test_the_job_is_named_after_the_script_unless_the_user_gives_a_name(project, capsys):
    main(["-N1", "train.py"])
    assert "#SBATCH --job-name=train " in project.seen("script")
    main(["-N1", "-m", "pkg.train"])
    assert "#SBATCH --job-name=pkg.train " in project.seen("script")
    main(["-N1", "-J", "mine", "train.py"])
    assert project.seen("script").count("--job-name") == 1
    (project.folder / "a\nb.py").write_text("pass")
    assert main(["-N1", "a\nb.py"]) == 0
    assert "#SBATCH --job-name=a_b " in project.seen("script")


def test_the_script_is_searched_in_the_folder_where_the_job_will_run(project):
    (project.folder / "sub").mkdir()
    (project.folder / "sub" / "other.py").write_text("pass")
    assert main(["-N1", "-D", "sub", "other.py"]) == 0
    assert project.agents().endswith(" -- other.py &")


def test_torchruns_options_are_accepted_in_torchruns_notation(project):
    argv = "--nnodes=2:4 --nproc_per_node=8 --rdzv_backend=c10d --max_restarts=3 --master_addr n1 --master_port=29501"
    assert main([*argv.split(), "--node_rank", "0", "--tee", "3", "--cpus_per_task=4", "train.py", "--a_b"]) == 0
    agents = project.agents()
    for words in ("--nodes 2:4", "--nproc-per-node 8", "--max-restarts 3", "--rdzv-endpoint n1:29501"):
        assert f" {words} " in agents
    assert agents.endswith(" -- train.py --a_b &")
    assert "#SBATCH --cpus-per-task=4 " in project.seen("script")


def test_plain_torchrun_gets_only_the_options_that_it_knows_and_nothing_else_is_listed(project):
    argv = "--nnodes=2 --template=torchrun --tee=3 --virtual-local-rank --role=a --rdzv-conf=join_timeout=9 --log-dir=l"
    assert main([*argv.split(), "--node-rank=0", "train.py"]) == 0
    command = project.seen("script").replace(" \\\n ", "")
    for words in ("--tee=3", "--virtual-local-rank", "--role=a", "--rdzv-conf=join_timeout=9,last_call_timeout=30"):
        assert f" {words} " in command
    assert f" --log-dir={project.folder}/l " in command
    listed = re.findall(r"^# (--[a-z-]+) ", project.seen("script"), re.MULTILINE)
    assert set(listed) == {
        *("--nodes", "--max-restarts", "--rdzv-endpoint", "--rdzv-conf", "--role", "--tee", "--log-dir", "--template"),
    }


def test_a_fixed_number_of_nodes_is_not_shown_as_a_range(project):
    assert main(["-N4", "train.py"]) == 0
    assert "MIN-MAX" not in project.seen("script")
    assert main(["-N4-8", "train.py"]) == 0
    assert re.search("^#SBATCH --nodes=4-8 .*MIN-MAX", project.seen("script"), re.MULTILINE)


def test_workers_may_be_any_program_and_the_job_has_its_name(project, capsys):
    assert main(["-N1", "--no-python", "nsys", "profile", "python", "train.py"]) == 0
    assert project.agents().endswith(" --no-python -- nsys profile python train.py &")
    assert "#SBATCH --job-name=nsys " in project.seen("script")
    for argv, message in (
        (["--no-python", "-m", "x"], "--no-python with --module"),
        (["--no-python", "train.py"], "--no-python train.py: is not on PATH; expected ./train.py, or leave out"),
        (["--no-python", "./train.py"], "--no-python ./train.py: expected a program that can be run"),
    ):
        assert main(["-N1", *argv]) == 2
        assert message in capsys.readouterr().err


def test_an_interpreter_may_have_options_and_a_blank_in_its_path(project):
    assert main(["-N1", "--python", "python3 -X faulthandler", "train.py"]) == 0
    assert " python3 -X faulthandler -u " in project.agents()
    (project.folder / "my python").write_text("")
    assert main(["-N1", "--python", "./my python", "train.py"]) == 0
    assert " './my python' -u " in project.agents()
    assert main(["-N1", "--container-image=x.sif", "--python=python3.12 -O", "train.py"]) == 0
    assert " x.sif env PYTHONSAFEPATH=1 python3.12 -O -u " in project.agents()


def test_task_counts_that_match_the_default_are_accepted(project, capsys):
    assert main(["-N4", "--ntasks-per-node=1", "-n", "4", "train.py"]) == 0
    assert "#SBATCH --ntasks" not in project.seen("script")
    assert main(["-N2:4", "-n", "4", "train.py"]) == 2
    assert "--ntasks=4: with a task count Slurm grants only MIN nodes" in capsys.readouterr().err


def test_the_warning_leaves_time_for_the_grace(project, capsys):
    assert main(["-N1", "--grace=5m", "--signal=usr1", "train.py"]) == 0
    assert "#SBATCH --signal=B:USR1@330 " in project.seen("script")
    assert main(["-N1", "--grace=100000", "--signal=R:USR1@90", "train.py"]) == 0
    assert "#SBATCH --signal=RB:USR1@90 " in project.seen("script")
    assert "comes 90 s before the time limit, less than the 100000 s of --grace" in capsys.readouterr().err
    assert main(["-N1", "--grace=1d", "train.py"]) == 2
    assert "--grace 86400: the workers get the warning 86430 s before the end" in capsys.readouterr().err


def test_the_message_points_out_that_t_is_torchruns_option_but_here_sbatchs(project, capsys):
    assert main(["-N1", "-t", "3", "train.py"]) == 0
    assert "-t 3 is sbatch's --time, in minutes; torchrun's -t is written --tee here" in capsys.readouterr().err
    assert main(["-N1", "-t0:3,1:3", "train.py"]) == 0
    assert "-t 0:3,1:3 is sbatch's --time" in capsys.readouterr().err
    assert main(["-N1", "--time=3", "train.py"]) == 0
    assert "--tee" not in capsys.readouterr().err


def test_with_chdir_a_script_in_the_submission_folder_is_found_as_by_sbatch_with_a_note(project, capsys):
    (project.folder / "sub").mkdir()
    (project.folder / "python").write_text("")
    assert main(["-N1", "-D", "sub", "--python", "./python -X dev", "train.py"]) == 0
    assert project.agents().endswith(f" -- {project.folder}/train.py &")
    assert f" {project.folder}/./python -X dev -u " in project.agents()
    assert f"runs {project.folder}/train.py: the folder of --chdir has no such script" in capsys.readouterr().err
    (project.folder / "sub" / "train.py").write_text("pass")
    assert main(["-N1", "-D", "sub", "train.py"]) == 0
    assert project.agents().endswith(" -- train.py &")
    assert f"runs {project.folder}/sub/train.py, in the folder of --chdir; there is also" in capsys.readouterr().err
    assert main(["-N1", "-D", "sub", "nope.py"]) == 2
    assert f"No such file or directory, neither here nor in --chdir {project.folder}/sub" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "grow"),
    [([], "off"), (["--grow"], "on"), (["--grow", "--"], "on"), (["--grow=on"], "on"), (["--grow=off"], "off")],
)
def test_grow_alone_means_on_and_leaves_the_script_alone(project, argv, grow):
    assert main(["-N", "2:4", *argv, "train.py", "x"]) == 0
    assert f" --grow {grow} " in project.agents()
    assert project.agents().endswith(" -- train.py x &")


def test_a_script_may_be_named_like_the_value_of_a_switch(project):
    (project.folder / "on").write_text("pass")
    assert main(["-N", "2:4", "--grow=on", "on"]) == 0
    assert project.agents().endswith(" -- on &")


def test_the_command_line_switches_off_what_a_file_switched_on(project):
    (project.folder / "elastic_hpc.toml").write_text("grow = true\nspares = 2\n")
    assert main(["-N", "4", "--grow=off", "--spares=0", "-G", "8", "train.py"]) == 0
    script = project.seen("script")
    assert re.search(r"^  --grow off +# command line$", script, re.MULTILINE)
    assert "#SBATCH --nodes=4 " in script


def test_with_plain_torchrun_the_files_settings_of_growth_are_ignored(project):
    (project.folder / "elastic_hpc.toml").write_text("grow = true\nspares = 2\nworld-multiple-of = 7\n")
    assert main(["-N", "2:4", "--nproc-per-node=2", "--template=torchrun", "train.py"]) == 0
    assert "#SBATCH --nodes=2-4 " in project.seen("script")
    assert "--nnodes=2:4" in project.seen("script")


@pytest.mark.parametrize(("text", "code"), [("echo", 2), ("run_dir=$ELASTIC_HPC_JOIN", 0)])
def test_a_users_template_must_support_joiners_if_the_job_can_grow(project, capsys, text, code):
    (project.folder / "my.j2").write_text(f"#!/bin/sh\n{text}\n")
    assert main(["-N", "2:4", "--template", "my.j2", "train.py"]) == 0
    (project.recorded / "argv").unlink()
    capsys.readouterr()
    assert main(["-N", "2:4", "--template", "my.j2", "--grow", "train.py"]) == code
    assert (project.seen("argv") is None) == (code == 2)
    refusal = "elastic-sbatch: --template my.j2 with --grow: it has no ELASTIC_HPC_JOIN, by which one more node finds "
    assert capsys.readouterr().err.startswith(refusal) == (code == 2)


def test_a_job_of_fixed_size_may_grow_to_replace_its_losses(project):
    assert main(["-N", "4", "--grow", "train.py"]) == 0


def test_a_multiple_of_workers_is_checked_where_their_number_is_known(project, capsys):
    assert main(["-N", "4:6", "--world-multiple-of=16", "--nproc-per-node=gpu", "train.py"]) == 0
    assert main(["-N", "4:6", "--world-multiple-of=16", "train.py"]) == 0
    assert main(["-N", "4:6", "--world-multiple-of=16", "--nproc-per-node=4", "train.py"]) == 0
    capsys.readouterr()
    assert main(["-N", "4:6", "--world-multiple-of=16", "--nproc-per-node=2", "train.py"]) == 2
    assert "for example --nodes 8\n" in capsys.readouterr().err


def test_defaults_come_from_the_projects_configuration_file(project):
    (project.folder / "elastic_hpc.toml").write_text("nodes = '2:4'\n[sbatch]\npartition = 'gpu'\n")
    assert main(["train.py"]) == 0
    assert "#SBATCH --partition=gpu                  # ./elastic_hpc.toml\n" in project.seen("script")


JOB_FILE = """
script = "train.py"
args = ["--lr", 1e-3]
nodes = "2:4"
max-restarts = 7
[sbatch]
partition = "gpu"
qos = false
"""


BAD_FILES = {
    "bad": "scripts = 'x'",
    "args": "script = 'x'\nargs = '--lr 1'",
    "noscript": "module = true",
    "range": "nodes = '4:2'",
}


def job_file(project, text=JOB_FILE):
    (project.folder / "job.toml").write_text(text)


def test_a_job_file_ranks_above_the_configuration_and_below_the_command_line(project, monkeypatch):
    job_file(project)
    (project.folder / "elastic_hpc.toml").write_text("max-restarts = 1\nspares = 1\n[sbatch]\nqos = 'low'\n")
    monkeypatch.setenv("SBATCH_PARTITION", "cpu")
    assert main(["-f", "job.toml"]) == 0
    script = project.seen("script")
    assert re.search(r"^#SBATCH --partition=gpu +# job.toml$", script, re.MULTILINE)
    assert "--qos" not in script
    assert {"--max-restarts 7", "--spares 1"} <= set(re.findall(r"--\S+ \d+", project.agents()))
    assert project.agents().endswith(" -- train.py --lr 0.001 &")
    (project.folder / "other.py").write_text("pass")
    assert main(["--file=job.toml", "-p", "long", "--max-restarts=2", "other.py", "x"]) == 0
    assert "#SBATCH --partition=long" in project.seen("script")
    assert "--max-restarts 2" in project.agents()
    assert project.agents().endswith(" -- other.py x &")


def test_a_file_may_name_a_module_or_leave_the_script_to_the_command_line(project):
    job_file(project, "nodes = 2\nscript = 'json.tool'\nmodule = true")
    assert main(["-f", "job.toml"]) == 0
    assert project.agents().endswith("--module -- json.tool &")
    job_file(project, "nodes = 2")
    assert main(["-f", "job.toml", "train.py"]) == 0
    assert project.agents().endswith(" -- train.py &")


def test_config_shows_the_effective_settings_and_their_sources(project, monkeypatch, capsys):
    job_file(project, f"notify = 'https://hooks.example/secret'\ngrace = '2m'\nsetup = 'module load a'\n{JOB_FILE}")
    env = "env = {A = 'b c', WANDB_API_KEY = 'x'}"
    (project.folder / "elastic_hpc.toml").write_text(f"spares = 1\n{env}\n[sbatch]\nqos = 'low'\n")
    monkeypatch.setenv("SBATCH_PARTITION", "cpu")
    monkeypatch.delenv("ELASTIC_HPC_CONFIG", raising=False)
    assert hpc(["config"]) == 0
    out = capsys.readouterr().out
    head, _, settings = out.partition("\n\n")
    assert [line.split()[0] for line in head.splitlines()] == ["site", "user", "project"]
    assert head.endswith("./elastic_hpc.toml")
    assert [line.split("  ")[0] for line in settings.splitlines()] == [
        "--spares=1", "--env='A=b c'", "--env=WANDB_API_KEY=...", "--qos=low", "--partition=cpu",
    ]  # fmt: skip
    assert settings.endswith("environment: SBATCH_PARTITION\n")
    assert hpc(["config", "show", "--file", "job.toml", "--json"]) == 0
    shown = {one["option"]: (one["value"], one["source"]) for one in json.loads(capsys.readouterr().out)["settings"]}
    assert shown == {
        "--nodes": ("2:4", "job.toml"), "--spares": ("1", "./elastic_hpc.toml"), "--max-restarts": ("7", "job.toml"),
        "--grace": ("120", "job.toml"), "--notify": ("https://hooks.example/...", "job.toml"),
        "--setup": ("module load a", "job.toml"), "--env": ("WANDB_API_KEY=...", "./elastic_hpc.toml"),
        "--partition": ("gpu", "job.toml"),
    }  # fmt: skip
    assert hpc(["config", "--all"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^--max-restarts=10 +default$", out, re.MULTILINE)
    assert re.search(r"^--tee +default: 0$", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train.py"], "--nodes: missing before the script, for example --nodes 2:4"),
        (["-N", "2:4"], "expected SCRIPT"),
        (["-N", "2", "--wrap", "hostname"], "--wrap=hostname: elastic-sbatch writes the batch script itself; give the"),
        (["-N", "2", "--node-rank=1", "train.py"], "--node-rank 1: one command starts the agents of all nodes"),
        ([], "expected SCRIPT; usage: elastic-sbatch [options] SCRIPT"),
        (["-f", "no.toml"], "--file no.toml: No such file or directory; expected a TOML file that can be read"),
        (["-f", "bad.toml"], "--file bad.toml: scripts: unknown key, did you mean script?"),
        (["-f", "args.toml"], "--file args.toml: args = '--lr 1': expected a list of words, for example"),
        (["-f", "noscript.toml"], "--file noscript.toml: module: needs a script too, for example script = 'train.py'"),
        (["-f", "range.toml", "train.py"], "--file range.toml: --nodes '4:2': expected N or MIN:MAX"),
        (["-f", "range.toml", "--from-batch", "x.sh"], "--file range.toml with --from-batch x.sh: expected one of"),
        (["-f", "range.toml", "--resume", "x"], "--file range.toml with --resume: the job keeps its options"),
        (["-N", "4:2", "train.py"], "--nodes '4:2': expected N or MIN:MAX with 1 <= MIN <= MAX"),
        (["-N", "4-2", "train.py"], "--nodes '4-2': expected N or MIN:MAX"),
        (["-N", "2", "nope.py"], "script 'nope.py': No such file or directory"),
        (["-N", "2", "."], "script '.': Is a directory"),
        (["-N", "2", "-p", "a", ":", "-p", "b", "train.py"], "':': heterogeneous jobs are not elastic"),
        (["-N", "2", "-m", "plane=4", "train.py"], "-m 'plane=4': expected the name of a Python module; sbatch's -m"),
        (["-m", "block", "-N2", "train.py"], "-m 'block': expected the name of a Python module; sbatch's -m"),
        (["-N", "2", "--max-restarts", "many", "train.py"], "--max-restarts 'many': expected a whole number"),
        (["-N", "2", "--env", "A-B=1", "train.py"], "--env 'A-B=1': expected NAME=VALUE"),
        (["-N", "2", "--comment=a\nb", "train.py"], "--comment='a\\nb': expected one line"),
        (["-N", "2", "--template", "nope", "train.py"], "--template 'nope': expected elastic, torchrun, or a file"),
        (["-N", "2", "--log-dir", "train.py/x", "train.py"], "--log-dir '"),
        (["-N", "2", "--template=torchrun", "--signal=USR1", "train.py"], "--signal: plain torchrun has no use for it"),
        (["-N", "2", "-n", "8", "train.py"], "--ntasks=8: with a task count"),
        (["-N", "4,4", "train.py"], "--nodes '4,4': expected N or MIN:MAX"),
        (["-N", "2", "--spares", "-1", "train.py"], "--spares '-1': expected a whole number, 0 or more"),
        (["-N", "2", "--grow=yes", "train.py"], "--grow 'yes': expected on or off"),
        (["-N", "2", "--grow=", "train.py"], "--grow '': expected on or off"),
        (["-N", "2", "--grow", "on", "train.py"], "--grow on: expected the value after '=', for example --grow=on"),
        (["-N", "2", "--free-growth", "off", "t.py"], "--free-growth off: expected the value after '='"),
        (["-N", "2", "--grow", "-G8", "train.py"], "--gpus=8: is for the whole job, and its number of nodes varies"),
        (["-N", "2:4", "--dry-run", "--gpus=8", "train.py"], "--gpus=8: is for the whole job, and its number of nodes"),
        (["-N", "2", "--spares=1", "--gpus=8", "train.py"], "--gpus=8: is for the whole job, and its number of nodes"),
        (["-N", "2", "--grow", "--template=torchrun", "train.py"], "--grow: plain torchrun has no use for it"),
        (["-N", "2", "--spares=1", "--template=torchrun", "train.py"], "--spares: plain torchrun has no use for it"),
        (
            ["-N", "2", "--time=2", "train.py"],
            "--time=2: Slurm warns the job 120 s before its end (--grace 90 s plus 30 s)",
        ),
        (
            ["-N", "2", "-t", "1:30", "--signal=USR2@90", "train.py"],
            "--time=1:30: Slurm warns the job 90 s before its end (--signal)",
        ),
        (["-N", "2:4", "--yield-to=all", "t.py"], "--yield-to 'all': expected pending, user, qos:NAME or partition:"),
        (["-N", "4", "--yield-to=user", "train.py"], "--yield-to user with --nodes 4: only nodes above MIN are given"),
        (["-N2:4", "--yield-every=9", "train.py"], "--yield-every: has no effect without --yield-to; add that, or"),
        (["-N", "2:4", "--notify-after=9", "train.py"], "--notify-after: has no effect without --notify; add that"),
        (["-N", "2,4", "--template=torchrun", "train.py"], "--nodes 2,4: plain torchrun expects N or MIN:MAX, for ex"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2_and_nothing_is_submitted(project, capsys, argv, message):
    for name, text in BAD_FILES.items():
        (project.folder / f"{name}.toml").write_text(text)
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"elastic-sbatch: {message}")
    assert err.count("\n") == 1
    assert project.seen("argv") is None


@pytest.mark.parametrize(
    "argv", [["--time=2:01"], ["--time=1", "--grace=20"], ["--time=0"], ["--time=1", "--template=torchrun"]]
)
def test_a_job_whose_warning_comes_only_after_its_start_is_submitted(project, argv):
    assert main(["-N", "2", *argv, "train.py"]) == 0


def test_a_file_may_set_an_option_for_jobs_that_have_the_option_it_belongs_to(project, capsys):
    (project.folder / "elastic_hpc.toml").write_text("yield-every = 7\nnotify-after = 7\ncontainer-runtime = 'pyxis'")
    assert main(["-N2:4", "--dry-run", "train.py"]) == 0
    assert not re.search("yield-every|notify-after|NOTIFY_AFTER|pyxis", capsys.readouterr().out)
    assert main(["-N2:4", "--yield-to=user", "--notify=mail", "train.py"]) == 0
    assert " --yield-every 7 " in project.agents()
    assert "NOTIFY_AFTER=7" in project.seen("script")


def test_a_refusal_by_slurm_is_one_line_and_exit_code_2(project, capsys):
    project.sbatch("echo 'sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed: "
                   "Invalid partition name specified' >&2; exit 1")  # fmt: skip
    assert main(["-N1", "train.py"]) == 2
    assert capsys.readouterr().err == (
        "elastic-sbatch: Slurm refused the job: invalid partition specified: x; "
        "Batch job submission failed: Invalid partition name specified\n"
    )


def test_a_refusal_names_the_source_of_a_value_that_the_user_has_not_typed(project, capsys, monkeypatch):
    project.sbatch("echo 'sbatch: error: Invalid --time specification' >&2; exit 1")
    monkeypatch.setenv("SBATCH_TIMELIMIT", "banana")
    monkeypatch.setenv("SBATCH_PARTITION", "gpu")
    assert main(["-N1", "train.py"]) == 2
    told = "Invalid --time specification (--time=banana, environment: SBATCH_TIMELIMIT)"
    assert capsys.readouterr().err == f"elastic-sbatch: Slurm refused the job: {told}\n"
    assert main(["-N1", "--time=8h", "train.py"]) == 2
    assert capsys.readouterr().err == "elastic-sbatch: Slurm refused the job: Invalid --time specification\n"


def test_an_option_of_ours_in_an_sbatch_line_of_a_script_does_not_reach_slurm(project, capsys):
    (project.folder / "lines.py").write_text("#SBATCH -N2\n#SBATCH --nproc-per-node=4\n")
    assert main(["lines.py"]) == 2
    assert "lines.py line 2: --nproc-per-node: an option of elastic-sbatch; expected on its" in capsys.readouterr().err


def test_a_cluster_that_does_not_answer_is_not_a_refusal(project, capsys):
    project.sbatch("echo 'sbatch: error: Batch job submission failed: Unable to contact slurm controller' >&2; exit 1")
    assert main(["-N1", "train.py"]) == 1
    assert capsys.readouterr().err.startswith("elastic-sbatch: sbatch: Batch job submission failed: Unable")


def test_without_slurm_the_error_shows_where_to_look(project, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(project.folder))
    assert main(["-N1", "train.py"]) == 1
    assert "is this a login node" in capsys.readouterr().err


def test_a_large_script_is_refused_without_a_traceback(project, capsys):
    project.sbatch("echo 'sbatch: error: no' >&2; exit 1")  # sbatch reads nothing, so the pipe breaks
    assert main(["-N1", "train.py", *["x" * 1000] * 300]) == 2
    assert capsys.readouterr().err == "elastic-sbatch: Slurm refused the job: no\n"


@pytest.mark.parametrize("columns", [80, 200])
def test_the_help_has_examples_and_needs_no_other_option(project, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["-p", "gpu", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    out = " ".join(word for line in lines for word in line.split())
    for text in (
        "elastic-sbatch --nodes 4:8 train.py",
        "passes all other options of sbatch through",
        "-N, --nodes N|MIN:MAX",
        "--grow[=on|off] add nodes",
        "--dry-run",
    ):
        assert text in out
    assert max(len(line) for line in lines if line.startswith((" " * 24, "A"))) <= min(columns, 120)
    assert max(map(len, lines)) <= 120


def test_help_after_the_script_belongs_to_the_script(project):
    assert main(["-N1", "train.py", "--help"]) == 0
    assert project.agents().endswith(" -- train.py --help &")


def test_control_c_ends_quietly(project, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("elastic_hpc.cli.sbatch.build", interrupted)
    assert main(["-N1", "train.py"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_reader_that_closes_early_causes_no_error_message(project):
    command = f"'{sys.executable}' '{ROOT}/bin/elastic-sbatch' --dry-run -N1 train.py {'x' * 100_000} | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"#!/bin/bash\n", b"")


def test_submitting_imports_neither_torch_nor_submitit_nor_other_heavy_packages(project):
    code = (
        "import sys; from elastic_hpc.cli.sbatch import main; assert main(['-N1', 'train.py']) == 0\n"
        "print({name.partition('.')[0] for name in sys.modules} & "
        "{'torch', 'numpy', 'submitit', 'ClusterShell', 'rich', 'asyncio', 'multiprocessing'})"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environ)
    assert done.stdout.decode().splitlines() == ["Submitted batch job 17", "set()"]


def test_a_plain_submission_imports_nothing_that_only_other_submissions_need(project):
    code = (
        "import sys; from elastic_hpc.cli.sbatch import main; assert main(['--parsable', '-N1', 'train.py']) == 0\n"
        "print(*sorted(name for name in sys.modules if name.startswith('elastic_hpc.') or name in "
        "{'argparse', 'tomllib', 'textwrap', 'difflib'}))"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environ, text=True)
    imported = set(done.stdout.splitlines()[1].split())
    folders = {name.split(".")[1] for name in imported if "." in name}
    assert not folders & {"from_batch", "membership", "view", "network", "agent", "training", "workers"}
    assert not imported & {"argparse", "tomllib", "textwrap", "difflib", "elastic_hpc.job.lookup"}
    assert {name for name in imported if name.startswith("elastic_hpc.slurm.")} == {
        "elastic_hpc.slurm.client", "elastic_hpc.slurm.submit",
    }  # fmt: skip


def test_templates_are_compiled_once_for_all_submissions(project, monkeypatch, tmp_path):
    from jinja2 import Environment
    from jinja2.bccache import bc_magic

    from elastic_hpc.job.script import _templates

    def submitted():
        _templates.cache_clear()
        assert main(["-N1", "train.py"]) == 0
        return re.sub(r"submission\.\w+", "", project.seen("script"))

    def compiles(*_, **__):
        raise AssertionError("a template is compiled")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    script = submitted()
    folder = tmp_path / "cache" / "elastic_hpc"
    assert folder.stat().st_mode & 0o077 == 0
    with monkeypatch.context() as patch:
        patch.setattr(Environment, "_generate", compiles)
        assert submitted() == script
    assert folder.parent.stat().st_mode & 0o077 == 0
    for path in folder.iterdir():
        path.write_bytes(b"damaged")
    assert submitted() == script
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[: len(bc_magic)])  # cut off, as after a crash of the node
    assert submitted() == script
    folder.chmod(0o777)  # other users could put code there
    with monkeypatch.context() as patch:
        patch.setattr(Environment, "_generate", compiles)
        with pytest.raises(AssertionError, match="is compiled"):
            submitted()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert submitted() == script


def test_an_edited_template_of_the_user_is_recompiled(project, monkeypatch, tmp_path):
    from elastic_hpc.job.script import _templates

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for text in ("one", "two"):
        _templates.cache_clear()
        (project.folder / "own.j2").write_text(f"#!/bin/bash\necho {text}\n")
        assert main(["-N1", "--template", "./own.j2", "train.py"]) == 0
        assert f"echo {text}" in project.seen("script")
