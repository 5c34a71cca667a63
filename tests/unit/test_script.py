import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sharedfs import Two

from elastic_hpc.agent.assembly import LEAVE
from elastic_hpc.errors import UsageError
from elastic_hpc.job.commands import agent_command, srun_options
from elastic_hpc.job.config import Setting
from elastic_hpc.job.quoting import Shell, directive, quote, quote_all
from elastic_hpc.job.script import built_in_templates, render, template_folder
from elastic_hpc.job.spec import JobSpec
from elastic_hpc.options.sbatch import SBATCH, Given, WarningSignal
from elastic_hpc.options.spec import LaunchSpec
from elastic_hpc.options.values import Endpoint, NodeRange

# Possible content of argv: any bytes but NUL, with special characters more often than by chance.
arguments = st.one_of(
    st.binary(max_size=12),
    st.text(max_size=12).map(lambda text: text.encode(errors="ignore")),
    st.sampled_from([b"", b"-", b"--", b"-x", b"a b", b"it's", b'"', b"\\", b"\n", b"\r\n", b"$HOME", b"`id`", b"!!"]),
).map(lambda data: os.fsdecode(data.replace(b"\0", b"")))


def stub(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def node():
    """A batch host without Slurm: srun writes its arguments, scontrol names a host, python writes its module."""
    folder = Path(tempfile.mkdtemp())
    stub(folder, "srun", f"printf '%s\\0' \"$@\" > {folder}/argv; . {folder}/srun_does")
    stub(folder, "scontrol", "echo n1; echo n2")
    stub(
        folder,
        "squeue",
        f'echo "$*" >> {folder}/queried; case "$*" in *%N) cat {folder}/nodes;; *) cat {folder}/ends;; esac',
    )
    (folder / "ends").write_text("Unknown\n")
    (folder / "nodes").write_text("4 n[1-4]\n")
    stub(folder, "python", f"shift 2; echo $* >> {folder}/asked")
    (folder / "srun_does").write_text("")
    yield folder
    shutil.rmtree(folder)


def job(node, *script_args, **changes):
    launch = LaunchSpec("train.py", script_args, nodes=NodeRange(2, 4))
    return JobSpec(**{"launch": launch, "log_dir": str(node / "logs"), "python": str(node / "python"), **changes})


def start(node, spec, before="", **environ):
    """Start the script of ``spec`` as sbatch would. ``before``: code that runs before
    the script in the same process.
    """
    script = node / "script"
    script.write_bytes(os.fsencode(render(spec)))
    environ = {
        "PATH": f"{node}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "4",
        "SLURM_JOB_NODELIST": "n[1-4]", "SLURM_CPUS_PER_TASK": "3", **environ,
    }  # fmt: skip
    argv = ["bash", "-c", f'{before}\nexec bash "$0"', script]
    return subprocess.Popen(argv, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def srun_argv(node, spec, **environ):
    process = start(node, spec, **environ)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, b"", b"")
    return [os.fsdecode(word) for word in (node / "argv").read_bytes().split(b"\0")[:-1]]


@settings(deadline=None, max_examples=60)
@given(words=st.lists(arguments, max_size=6))
def test_the_scripts_arguments_arrive_byte_for_byte_through_bash(node, words):
    argv = srun_argv(node, job(node, *words))
    assert argv[argv.index("--") :] == ["--", "train.py", *words]


@settings(deadline=None, max_examples=60)
@given(words=st.lists(arguments, min_size=1, max_size=20))
def test_quoted_words_are_valid_utf_8_without_control_characters(words):
    text = quote_all(words)
    assert text.encode()
    assert all(char.isprintable() or ord(char) >= 128 for char in text.replace(" \\\n", ""))
    printed = subprocess.run(["bash", "-c", f"printf '%s\\0' {text}"], capture_output=True, check=True).stdout
    assert printed == b"".join(os.fsencode(word) + b"\0" for word in words)


@settings(deadline=None, max_examples=15)
@given(value=arguments)
def test_variables_and_the_log_directory_arrive_byte_for_byte(node, value):
    name = value.replace("/", "_").strip(".") or "x"
    spec = job(node, env={"A_1": Setting(value, "command line")}, log_dir=str(node / f"logs{name}"))
    (node / "srun_does").write_text(f'printf %s "$A_1" > {node}/seen')
    argv = srun_argv(node, spec)
    (node / "srun_does").write_text("")
    assert (node / "seen").read_bytes() == os.fsencode(value)
    assert argv[argv.index("--run-dir") + 1] == f"{spec.log_dir}/7"
    assert Path(spec.log_dir, "7", "script.sbatch").is_file()
    assert Path(spec.log_dir, "7").stat().st_mode & 0o777 == 0o700


def test_srun_starts_one_agent_on_each_granted_node_and_the_first_host_is_the_endpoint(node):
    argv = srun_argv(node, job(node))
    assert {"--nodes=4", "--ntasks=4", "--ntasks-per-node=1"} <= {*argv}
    assert {"--no-kill", "--kill-on-bad-exit=0", "--wait=0"} <= {*argv}
    assert not any(word.startswith("--cpus-per-task") for word in argv)
    assert argv[argv.index("--rdzv-endpoint") + 1] == "n1:29400"


@pytest.mark.parametrize("template", built_in_templates())
def test_srun_does_not_wait_for_a_node_that_slurm_has_taken_from_the_job_before(node, template):
    (node / "nodes").write_text("3 n[1-2,4]\n")
    (node / "srun_does").write_text('[ "$SLURM_JOB_NODELIST" = "n[1-2,4]" ] || echo no >&2')
    assert {"--nodes=3", "--ntasks=3"} <= {*srun_argv(node, job(node, template=template))}
    (node / "srun_does").write_text("")
    (node / "nodes").write_text("slurm_load_jobs error\n")
    assert {"--nodes=4", "--ntasks=4"} <= {*srun_argv(node, job(node, template=template))}
    (node / "nodes").write_text("4 n[1-4]\n")


def test_squeue_is_asked_about_one_task_of_an_array(node):
    """The last task has the job id of the whole array."""
    (node / "queried").unlink(missing_ok=True)
    srun_argv(node, job(node), SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="2")
    assert [line.split()[1] for line in (node / "queried").read_text().splitlines()] == ["--jobs=7_2"] * 2


def test_no_process_waits_for_a_verdict_after_srun_has_ended_whatever_signals_are_lost(node):
    """Bash loses a trap that becomes due while it reads a $( ), as if the signal were ignored."""
    process = start(node, job(node), before="trap '' TERM")
    assert (*process.communicate(timeout=20), process.returncode) == (b"", b"", 0)


def test_requested_cores_are_repeated_on_the_srun_line(node):
    (node / "srun_does").write_text('[ "$SRUN_CPUS_PER_TASK" = 3 ] || echo no >&2')
    assert "--cpus-per-task=3" in srun_argv(node, job(node, sbatch=(Given(SBATCH["cpus-per-task"], "3"),)))
    (node / "srun_does").write_text("")


def test_the_users_own_endpoint_is_used_as_it_is(node):
    launch = LaunchSpec("train.py", nodes=NodeRange(2, 2), rdzv_endpoint=Endpoint("n2", 1234))
    argv = srun_argv(node, job(node, launch=launch))
    assert argv[argv.index("--rdzv-endpoint") + 1] == "n2:1234"


def test_each_task_of_an_array_has_its_own_run_directory(node):
    argv = srun_argv(node, job(node), SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="2")
    assert argv[argv.index("--run-dir") + 1] == f"{node}/logs/5_2"


def test_a_job_that_continues_another_has_the_run_directory_of_that_job(node):
    argv = srun_argv(node, job(node), ELASTIC_HPC_CONTINUE=f"{node}/logs/it's 5")
    assert argv[argv.index("--run-dir") + 1] == f"{node}/logs/it's 5"
    assert Path(node, "logs", "it's 5", "script.sbatch").is_file()


def test_a_joiner_runs_in_the_run_directory_of_the_job_it_joins_and_does_not_change_the_jobs_files(node):
    run_dir = node / "logs" / "it's } 6"
    run_dir.mkdir(parents=True)
    (run_dir / "over").write_text("3")
    (node / "asked").unlink(missing_ok=True)
    environ = {"ELASTIC_HPC_JOIN": str(run_dir), "ELASTIC_HPC_CONTINUE": "/elsewhere", "SLURM_JOB_NUM_NODES": "1"}
    (node / "nodes").write_text("1 n5\n")
    argv = srun_argv(node, job(node, log_dir=str(node / "own } logs")), **environ)
    (node / "nodes").write_text("4 n[1-4]\n")
    assert "--nodes=1" in argv
    assert argv[argv.index("--run-dir") + 1] == str(run_dir)
    assert [path.name for path in run_dir.iterdir()] == ["over"]
    assert not (node / "own } logs").exists()
    assert (node / "asked").read_text() == f"elastic_hpc conclude {run_dir} 0 --signal URG --max-requeues 5\n"


def test_an_ended_job_that_is_restarted_ends_immediately_with_its_exit_code(node):
    run_dir = node / "logs" / "8"
    run_dir.mkdir(parents=True)
    (run_dir / "over").write_text("3")
    process = start(node, job(node), SLURM_JOB_ID="8")
    assert (*process.communicate(timeout=20), process.returncode) == (b"", b"", 3)
    assert [*run_dir.iterdir()] == []


@pytest.mark.parametrize(
    ("spares", "line"),
    [
        (0, "--nodes=2-4 # MIN-MAX: starts when MIN are free, gets up to MAX"),
        (2, "--nodes=2-6 # MIN-(MAX+spares): starts when MIN are free, gets up to MAX and the spares"),
    ],
)
@pytest.mark.parametrize("template", built_in_templates())
def test_spares_are_nodes_that_the_job_does_not_wait_for(node, template, spares, line):
    text = render(job(node, template=template, launch=LaunchSpec("t.py", nodes=NodeRange(2, 4), spares=spares)))
    assert f"#SBATCH {line}" in [" ".join(directive.split()) for directive in text.splitlines()]


def test_setup_lines_run_as_written_before_srun(node):
    (node / "srun_does").write_text('[ "$A" = "1 2" ] || echo "A is $A" >&2')
    spec = job(node, setup=(Setting('A="1 $((1 + 1))"\nexport A', "x"), Setting("true # $(", "x")))
    assert srun_argv(node, spec)
    (node / "srun_does").write_text("")


@pytest.mark.parametrize("name", ["URG", "USR2"])
def test_the_warning_reaches_the_agents_and_the_script_still_returns_sruns_exit_code(node, name):
    (node / "asked").unlink(missing_ok=True)
    (node / "srun_does").write_text(f"touch {node}/ready; sleep 1; exit 3")
    (node / "ready").unlink(missing_ok=True)
    process = start(node, job(node, signal=WarningSignal(name, timedelta(seconds=60))))
    while not (node / "ready").exists():
        time.sleep(0.02)
    for _ in range(2):
        process.send_signal(signal.Signals[f"SIG{name}"])
        time.sleep(0.2)
    assert process.communicate(timeout=20) == (b"", b"")
    (node / "srun_does").write_text("")
    warned = f"elastic_hpc warned {node}/logs/7\n"
    conclude = f"elastic_hpc conclude {node}/logs/7 3 --signal {name} --max-requeues 5\n"
    assert (node / "asked").read_text() == warned + warned + conclude


@pytest.mark.parametrize(("left", "warned"), [(50, True), (62, True), (100, False), (3600, False), (None, False)])
def test_a_warning_that_slurm_sent_before_the_script_began_is_not_lost(node, left, warned):
    """Also if Slurm sent the warning early; it may be up to a minute early."""
    (node / "asked").unlink(missing_ok=True)
    (node / "ends").write_text(f"{time.time() + left:.0f}\n" if left else "Unknown\n")
    (node / "srun_does").write_text("sleep 4" if left == 62 else "sleep 0.5")
    process = start(node, job(node, signal=WarningSignal(lead=timedelta(seconds=60))))
    assert process.communicate(timeout=20) == (b"", b"")
    (node / "srun_does").write_text("")
    (node / "ends").write_text("Unknown\n")
    assert ("elastic_hpc warned" in (node / "asked").read_text()) == warned


def test_a_warning_that_comes_before_bash_has_read_the_script_neither_ends_it_nor_is_lost(node):
    """If the warning was due during the prolog, Slurm sends it as soon as the script's process exists."""
    (node / "asked").unlink(missing_ok=True)
    (node / "ends").write_text(f"{time.time() + 50:.0f}\n")
    name = WarningSignal().name
    process = start(node, job(node), before=f"kill -{name} $$")
    assert (*process.communicate(timeout=20), process.returncode) == (b"", b"", 0)
    (node / "ends").write_text("Unknown\n")
    assert "elastic_hpc warned" in (node / "asked").read_text()


def test_a_warning_that_comes_as_soon_as_the_script_begins_does_not_end_it(node):
    (node / "asked").unlink(missing_ok=True)
    slow = stub(node, "install", f'touch {node}/began; sleep 0.5; exec /usr/bin/install "$@"')
    process = start(node, job(node))
    while not (node / "began").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGURG)
    assert (*process.communicate(timeout=20), process.returncode) == (b"", b"", 0)
    slow.unlink()
    assert "elastic_hpc warned" in (node / "asked").read_text()


def test_a_warning_that_comes_before_conclude_listens_does_not_end_the_script(node):
    asked, python = node / "asked", stub(node, "slow_python", f"touch {node}/ready; sleep 1; echo $* > {node}/asked")
    asked.unlink(missing_ok=True)
    (node / "ready").unlink(missing_ok=True)
    process = start(node, job(node, python=str(python)))
    while not (node / "ready").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGURG)
    assert (*process.communicate(timeout=20), process.returncode) == (b"", b"", 0)
    assert " conclude " in asked.read_text()


def full_job(node, template):
    return job(
        node,
        "it's", "\r\n", "\udcff", "*",
        template=template,
        sbatch=(
            Given(SBATCH["cpus-per-task"], "4", "site.toml"),
            Given(SBATCH["comment"], 'a # "b"'),
            Given(SBATCH["array"], "1-3%2"),
            Given(SBATCH["hold"], None),
        ),
        setup=(Setting("true", "command line"),),
        env={"A": Setting("b\nc", "command line")},
    )  # fmt: skip


@pytest.mark.parametrize("template", built_in_templates())
def test_every_built_in_script_is_clean(node, template):
    path = node / f"{template}.sh"
    path.write_bytes(os.fsencode(render(full_job(node, template))))
    subprocess.run(["bash", "-n", path], check=True)
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", path], check=True)


@pytest.mark.parametrize("template", built_in_templates())
def test_the_directives_keep_the_job_elastic_and_never_set_a_number_of_tasks(node, template):
    text = render(full_job(node, template))
    directives = [line.split(" # ")[0].strip() for line in text.splitlines() if line.startswith("#SBATCH")]
    for line in ("--nodes=2-4", "--no-kill", "--requeue", "--open-mode=append", "--array=1-3%2", "--hold"):
        assert f"#SBATCH {line}" in directives
    assert ("#SBATCH --signal=B:URG@120" in directives) == (template == "elastic")
    assert not any("ntasks" in line for line in directives)
    assert re.search(r"--cpus-per-task=4 +# site\.toml$", text, re.MULTILINE)


def test_each_setting_is_listed_with_its_source(node):
    text = render(job(node, sources={"nodes": "/etc/elastic.toml"}))
    assert re.search(r"^  --nodes 2:4 +# /etc/elastic\.toml; #SBATCH --nodes must match$", text, re.MULTILINE)
    assert re.search(r"^  --max-restarts 10 +# default$", text, re.MULTILINE)


def test_the_torchrun_template_writes_the_quickstarts_command(node):
    launch = LaunchSpec("train.py", ("--lr", "1"), nodes=NodeRange(2, 4), nproc_per_node="8", max_restarts=3)
    argv = srun_argv(node, job(node, launch=launch, template="torchrun"))
    assert argv[argv.index("torch.distributed.run") :] == [
        "torch.distributed.run", "--nnodes=2:4", "--nproc-per-node=8", "--max-restarts=3", "--rdzv-id=7",
        "--rdzv-backend=c10d", "--rdzv-endpoint=n1:29400", "--", "train.py", "--lr", "1",
    ]  # fmt: skip


def test_a_users_template_has_the_same_variables_and_may_include_ours(node):
    path = node / "my.j2"
    path.write_text('#!/bin/sh\n{% include "directives.j2" %}\necho {{ launch.script_args | list | quote_all }}\n')
    assert (
        render(job(node, "a b", template=str(path)))
        .partition("# elastic-sbatch --resume")[0]
        .endswith("\necho 'a b'\n")
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [("{{ nope }}", "'nope' is undefined"), ("\n{% if %}", "line 2"), ("{% include 'nope' %}", "nope")],
)
def test_a_broken_template_is_one_line(node, text, message):
    path = node / "broken.j2"
    path.write_text(text)
    with pytest.raises(UsageError, match=f"--template .*broken.j2.*{message}"):
        render(job(node, template=str(path)))


def test_the_error_for_a_missing_template_names_the_existing_ones(node):
    with pytest.raises(UsageError, match="--template 'nope': expected elastic, torchrun, or a file"):
        render(job(node, template="nope"))


def sbatch_reads(line):
    """Reads a directive as sbatch does, according to sbatch's source: words, quotes, backslashes, comments."""
    words, word, quoted, escaped = [], None, "", False
    for char in line.removeprefix("#SBATCH"):
        if escaped:
            word, escaped = word + char, False
        elif char == "\\":
            word, escaped = word or "", True
        elif quoted:
            word, quoted = (word, "") if char == quoted else (word + char, quoted)
        elif char in "\"'":
            word, quoted = word or "", char
        elif char == "#":
            break
        elif char.isspace():
            words, word = words + [word] * (word is not None), None
        else:
            word = (word or "") + char
    assert not quoted
    return words + [word] * (word is not None)


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc"])), st.sampled_from(["", "a # reason's"]))
def test_every_value_on_one_line_survives_sbatchs_own_quoting(value, reason):
    assert sbatch_reads(directive("--comment", value, reason)) == [f"--comment={value}"]


@pytest.mark.parametrize("value", ["a\nb", "a\r", "\x1b"])
def test_a_directive_with_a_line_break_is_refused(value):
    with pytest.raises(UsageError, match=r"--comment=.*expected one line"):
        directive("--comment", value)


def test_the_same_srun_line_serves_an_allocation_with_plain_values():
    words = [
        "srun",
        *srun_options("4", "2"),
        *agent_command(LaunchSpec("t.py"), head="n1", run_dir="/r d", python="/p"),
    ]
    assert "--nodes=4" in words
    assert words[words.index("--run-dir") + 1] == "/r d"
    assert "n1:29400" in words
    assert not any(isinstance(word, Shell) for word in words)


def test_shell_syntax_is_never_quoted_twice():
    assert quote(Shell('"$x"')) == '"$x"'
    assert quote('"$x"') == "'\"$x\"'"


def test_the_end_of_a_job_finds_a_recreated_working_directory(node, tmp_path):
    work, where = tmp_path / "it's work", tmp_path / "where"
    work.mkdir()
    python = stub(tmp_path, "python", f'[ "$4" != conclude ] || readlink /proc/self/cwd > {where}')
    (node / "srun_does").write_text(f"rmdir {quote(str(work))}; mkdir {quote(str(work))}")
    process = start(node, job(node, python=str(python)), before=f"cd {quote(str(work))}")
    process.communicate(timeout=20)
    (node / "srun_does").write_text("")
    assert where.read_text() == f"{work}\n"


@pytest.mark.parametrize("left", [False, True])
def test_an_srun_that_still_waits_after_the_verdict_is_ended_and_the_script_concludes(node, left):
    """For example srun waits for a frozen agent. Pauses are at least a hundred times shorter than in production."""
    run_dir = node / "logs" / "9"
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "verdict.json").write_text("that of the run before")
    (node / "asked").unlink(missing_ok=True)
    (node / "ended").unlink(missing_ok=True)
    (node / "slept").unlink(missing_ok=True)
    fast = stub(node, "sleep", f'echo "$1" >> {node}/slept; exec {shutil.which("sleep")} "0.0$1"')
    stays = f"trap 'echo TERM >> {node}/ended' TERM; touch {node}/ready; while :; do /bin/sleep 0.02; done"
    (node / "srun_does").write_text(stays)
    (node / "ready").unlink(missing_ok=True)
    (run_dir / "left").unlink(missing_ok=True)
    process = start(node, job(node), SLURM_JOB_ID="9")
    try:
        slept = node / "slept"
        while not ((node / "ready").exists() and slept.exists() and slept.read_text().count("2\n") >= 4):
            time.sleep(0.02)
        assert process.poll() is None, "the verdict of the run before does not count"
        if left:
            (run_dir / "left").touch()  # all agents except those of lost nodes have left
        (run_dir / "new").write_text("that of this run")
        before = slept.read_text().count("2\n")
        (run_dir / "new").replace(run_dir / "verdict.json")
        after = slept.read_text().count("2\n")
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
        fast.unlink()
        (node / "srun_does").write_text("")
    assert b"the job has ended, but srun waits for a lost or frozen agent: ending srun\n" in err
    pauses = slept.read_text().count("2\n")
    assert pauses - after <= 3 if left else pauses - before >= 21, "40 s for agents to leave"
    assert (node / "ended").read_text() == "TERM\n", "srun may end its steps before it is killed"
    assert (node / "asked").read_text() == f"elastic_hpc conclude {run_dir} 137 --signal URG --max-requeues 5\n"


def test_srun_is_not_ended_when_a_leader_has_withdrawn_the_verdict_of_an_agent_without_a_leader(node):
    run_dir = node / "logs" / "11"
    run_dir.mkdir(parents=True, exist_ok=True)
    slept, ended, verdict = node / "slept", node / "ended", run_dir / "verdict.json"
    slept.unlink(missing_ok=True)
    fast = stub(node, "sleep", f'echo "$1" >> {slept}; exec {shutil.which("sleep")} "0.0$1"')
    (node / "srun_does").write_text(f"trap 'echo TERM >> {ended}' TERM; while :; do /bin/sleep 0.02; done")
    process = start(node, job(node), SLURM_JOB_ID="11")

    def pauses(more):
        end = more + slept.read_text().count("2\n") if slept.exists() else more
        while not slept.exists() or slept.read_text().count("2\n") < end:
            assert process.poll() is None
            time.sleep(0.02)

    try:
        pauses(4)
        verdict.write_text("of an agent without a leader")
        pauses(4)
        verdict.unlink()
        pauses(30)  # 40 s after the verdict, in production, the script would end srun
        verdict.write_text("of the leader")
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
        fast.unlink()
        (node / "srun_does").write_text("")
    assert b": ending srun\n" in err


@pytest.fixture
def two(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("mounting needs root: sudo make test")
    made = Two(tmp_path)
    made.server.behave(attributes_s=600, names_s=600)
    yield made
    made.server.close()


def test_the_script_sees_new_files_of_another_node_on_nfs_even_if_it_has_looked_before(node, two):
    ours, theirs = two.b / "7", two.a / "7"
    theirs.mkdir()
    (node / "slept").unlink(missing_ok=True)
    fast = stub(node, "sleep", f'echo "$1" >> {node}/slept; exec {shutil.which("sleep")} "0.0$1"')
    (node / "srun_does").write_text("while :; do /bin/sleep 0.02; done")
    process = start(node, job(node, log_dir=str(two.b)))
    try:
        while not ((node / "slept").exists() and (node / "slept").read_text().count("2\n") >= 4):
            time.sleep(0.02)
        (theirs / "left").touch()
        (theirs / "verdict.json").write_text("that of this run")
        assert b": ending srun\n" in process.communicate(timeout=20)[1]
    finally:
        process.kill()
        fast.unlink()
        (node / "srun_does").write_text("")
    assert not (ours / "over").exists()
    (theirs / "over").write_text("3")
    process = start(node, job(node, log_dir=str(two.b)))
    assert (*process.communicate(timeout=20), process.returncode) == (b"", b"", 3)


def test_agents_have_enough_time_to_leave():
    assert "for _ in {1..20}; do if : " in (template_folder() / "elastic.sbatch.j2").read_text()
    assert LEAVE < 40


def test_a_users_template_may_put_a_command_around_the_agents_of_ours(node):
    path = node / "around.j2"
    path.write_text('{% set agent_command = ["env", "A=1"] + agent_command %}{% include "elastic.sbatch.j2" %}')
    words = srun_argv(node, job(node, template=str(path)))
    assert words[words.index("env") + 1] == "A=1"
    assert words[words.index("--max-restarts") + 1] == "10"
    text = render(job(node, template=str(path)))
    assert text.index("env A=1 ") < text.index('"${agent_options[@]}"')
