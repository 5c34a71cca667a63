"""How the three commands start and end with any kind of streams."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import records
from test_once_more import slurm as stand_in_for_slurm

from elastic_hpc import __version__
from elastic_hpc.cli import sbatch, srun
from elastic_hpc.cli.hpc import _HERE, MODULES, main
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.record.worker_logs import label

FAULTS = str(records.FOLDER / "faults")
COMMANDS = {"elastic-hpc": main, "elastic-sbatch": sbatch.main, "elastic-srun": srun.main}
NAMES = (*MODULES, *_HERE)
HPC = [sys.executable, "-m", "elastic_hpc"]
SBATCH = [sys.executable, "-m", "elastic_hpc.cli.sbatch"]
SRUN = [sys.executable, "-m", "elastic_hpc.cli.srun"]
WRITERS = [
    *([*HPC, *words] for words in (["--help"], ["--version"], ["status", "--help"], ["nosuch"])),
    *([*HPC, *words, FAULTS] for words in (["status"], ["status", "--json"], ["status", "--watch"], ["why"], ["logs"])),
    *([*HPC, *words, FAULTS] for words in (["logs", "-f"], ["metrics"], ["timeline", "--html", "-"])),
    [*HPC, "doctor"],
    [*SBATCH, "--help"],
    [*SRUN, "--help"],
    [*SRUN, "--local", "0", "train.py"],
]


def called(command: list[str], **streams: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, timeout=60, check=False, **streams)  # type: ignore[call-overload,no-any-return]


def a_pipe_that_nobody_reads() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("command", WRITERS, ids=lambda words: " ".join(map(str, words[2:-1])))
def test_a_reader_that_closes_early_is_no_error(command: list[str]) -> None:
    pipe = a_pipe_that_nobody_reads()
    done = called(command, stdout=pipe, stderr=subprocess.PIPE)
    assert b"Traceback" not in done.stderr
    assert b"BrokenPipe" not in done.stderr
    assert called(command, stdout=pipe, stderr=pipe).returncode in {0, 1, 2}
    os.close(pipe)


@pytest.mark.parametrize("words", [["logs", "-f"], ["status", "--watch"]])
def test_a_command_that_follows_a_job_ends_with_its_reader_even_if_it_writes_nothing(
    words: list[str], tmp_path: Path
) -> None:
    rundir = RunDir(records.copy("faults", tmp_path))
    (rundir.path / "verdict.json").unlink()
    with rundir.hold(), subprocess.Popen([*HPC, *words, str(rundir.path)], stdout=subprocess.PIPE) as follows:
        assert follows.stdout
        if "-f" in words:
            assert follows.stdout.readline().startswith(b"--- round 1")
        follows.stdout.close()
        assert follows.wait(timeout=30) == 1


def test_a_full_disk_is_reported_in_one_line() -> None:
    with open("/dev/full", "w") as full:
        for command in ([*HPC, "status", FAULTS], [*HPC, "--help"], [*HPC, "status", "--json", FAULTS]):
            done = called(command, stdout=full, stderr=subprocess.PIPE)
            assert (done.returncode, done.stderr) == (1, b"elastic-hpc: cannot write: No space left on device\n")


@pytest.mark.parametrize(("outcome", "code", "restarts"), [("finished", 0, 0), ("failed", 1, 0), ("requeue", 0, 1)])
def test_the_fate_of_a_job_does_not_depend_on_its_output_file(
    tmp_path: Path, outcome: str, code: int, restarts: int
) -> None:
    """The output file is full, or was replaced on the file server."""
    stand_in_for_slurm(tmp_path, "22.05.8", "None")
    rundir = RunDir(tmp_path / "run").create()
    rundir.write("verdict.json", {"run": 0, "outcome": outcome, "cause": "", "reason": "", "failure": None})
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}  # without PYTHONUNBUFFERED
    with open("/dev/full", "w") as full:
        done = called([*HPC, "conclude", str(rundir.path), "0"], stdout=full, stderr=full, env=environ)
    assert done.returncode == code
    assert f"Restarts={restarts}" in (tmp_path / "job").read_text()


@pytest.mark.parametrize("words", [["elastic-sbatch", "-N1", "x.py"], ["elastic-srun", "--local", "1", "x.py"],
                                   ["elastic-hpc", "doctor"]])  # fmt: skip
def test_a_removed_folder_is_reported_in_one_line(words: list[str], tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name(words[0])), *words[1:]]
    script = f"cd {shlex.quote(str(tmp_path))} && mkdir gone && cd gone && rmdir ../gone && {shlex.join(command)}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    said = f"{words[0]}: the current directory does not exist any more; cd to one that does"
    # A command at a path with a blank starts as a shell script, whose shell complains too.
    lines = [line for line in done.stderr.splitlines() if not line.startswith("sh: ")]
    assert (done.returncode, lines) == (2, [said])


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users can enter. Each pytest closes the parent of ``tmp_path`` to them when it starts."""
    with tempfile.TemporaryDirectory() as path:
        Path(path).chmod(0o755)
        yield Path(path)


@pytest.mark.skipif(os.getuid() != 0, reason="takes on another user")
@pytest.mark.parametrize("words", [["status"], ["why"], ["logs"], ["drain"], ["stop"], ["timeline", "--html", "-"]])
def test_another_users_job_is_refused_in_one_line(words: list[str], open_folder: Path) -> None:
    folder = records.copy("faults", open_folder)
    folder.chmod(0o700)
    other = {"stderr": subprocess.PIPE, "env": {**os.environ, "HOME": str(open_folder)}, "user": 65534, "group": 65534}
    try:
        runs = called([*HPC, "--version"], **other).returncode == 0
    except PermissionError:
        runs = False
    if not runs:
        pytest.skip("another user cannot run this checkout")
    done = called([*HPC, *words, str(folder)], **other)
    assert done.returncode == 1
    assert re.fullmatch(rb"elastic-hpc: /\S+: Permission denied\n", done.stderr)


def test_a_command_without_any_streams_works() -> None:
    closed = "exec >&- 2>&-; exec " + shlex.join([*HPC, "status", "--json", FAULTS])
    assert called(["/bin/sh", "-c", closed]).returncode == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("words", [["logs"], ["why"], ["status"], ["timeline", "--html", "-"]])
def test_a_character_that_the_terminal_lacks_is_shown_as_a_question_mark(
    words: list[str], encoding: str, tmp_path: Path
) -> None:
    folder = records.copy("broken", tmp_path).rename(tmp_path / "日本")
    written = "Größe ✓ 日本"
    for path in folder.glob("logs/*/*.rank0.log"):
        path.write_bytes(label(0, "err", 1.0) + f"{written}\n".encode())
    record = records.events("broken")
    for event in record:
        event.update(reason=written) if event["event"] == "verdict" else None
    records.write(folder, record)
    environ = {**os.environ, "PYTHONIOENCODING": encoding}
    done = called([*HPC, *words, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ)
    assert (done.returncode, done.stderr) == (0, b"")
    if words != ["timeline", "--html", "-"]:
        assert b"?" in done.stdout
    bad = called([*HPC, "why", f"{folder}✓"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ)
    assert bad.returncode == 2
    assert b"expected the ID of a job" in bad.stderr


@pytest.mark.parametrize("switch", ["-V", "--version"])
def test_each_command_shows_its_version(capsys: pytest.CaptureFixture[str], switch: str) -> None:
    for name, command in COMMANDS.items():
        assert command([switch]) == 0
        assert capsys.readouterr().out == f"{name} {__version__}\n"
    for name in ("plan", "status", "drain"):
        assert main([name, switch]) == 0
        assert capsys.readouterr().out == f"elastic-hpc {__version__}\n"


@pytest.mark.parametrize("argv", [[name] for name in COMMANDS] + [["elastic-hpc", name] for name in NAMES])
def test_help_fits_a_terminal_of_80_columns_and_ends_with_the_same_exit_codes(
    argv: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert COMMANDS[argv[0]]([*argv[1:], "--help"]) == 0
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert "\n\nExit codes: 0 success; 1 failure; 2 the request was refused; 130 Ctrl-C." in text


@pytest.mark.parametrize("words", [["status", FAULTS], ["status"], ["status", "--watch", FAULTS], ["doctor"]])
def test_nothing_is_wrapped_or_filled_with_blanks_in_a_pipe(words: list[str], tmp_path: Path) -> None:
    environ = {"PATH": str(tmp_path), "COLUMNS": "40"}
    text = called([*HPC, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environ).stdout.decode()
    assert re.search("^(job|no|bad)", text, re.IGNORECASE | re.MULTILINE)
    assert re.findall(" +$", text, re.MULTILINE) == []
    assert words != ["doctor"] or re.search("^.{60}", text, re.MULTILINE)


def test_the_help_of_each_command_starts_with_its_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in COMMANDS.items():
        assert command(["-h"]) == 0
        assert capsys.readouterr().out.startswith(f"usage: {name} ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "expected a command, for example elastic-hpc status; elastic-hpc --help lists all commands"),
        (["stat"], "stat: unknown command; did you mean status?"),
        (["help"], "help: unknown command; elastic-hpc --help lists all commands"),
        (["--verbose"], "--verbose: unknown option; elastic-hpc --help lists all commands"),
        (["status", "--wach"], "--wach: unknown option; did you mean --watch?"),
        (["metrics", "--ever", "30"], "--ever: unknown option; did you mean --every?"),
        (["logs", "--folow"], "--folow: unknown option; did you mean --follow?"),
        (["logs", "-x"], "-x: unknown option; elastic-hpc logs --help lists all options"),
        (["resize", "--wrong", "no-job"], "--wrong: unknown option; elastic-hpc resize --help lists all options"),
        (["notice", "--node", "n3"], "--node: expected 2 values: --node NODE REASON"),
        (["logs", FAULTS, "-n"], "--lines: expected a value: --lines N"),
        (["doctor", "-N"], "--nodes: expected a value: --nodes N"),
        (["notice"], "expected --node or --well; usage: elastic-hpc notice [options] [JOB]"),
        (["logs", FAULTS, "--stdout", "--stderr"], "--stdout with --stderr: expected one of them"),
        (["status", "--json=3"], "--json=3: expected no value, for example --json"),
        (["status", "--js"], "--js: unknown option; did you mean --json?"),
        (["plan"], "expected SCRIPT; usage: elastic-hpc plan [options] SCRIPT [ARGS...]"),
        (["plan", __file__], "--nodes: missing before the script, for example --nodes 2:4"),
        (["plan", "-Z"], "-Z: unknown option; elastic-hpc plan --help lists all options"),
        (["metrics", "--every", "3"], "--every 3: is for --output FILE; add that, or leave it out"),
        (["metrics", "--address", "::1"], "--address ::1: is for --port PORT; add that, or leave it out"),
        (["notice", "--nod", "n3"], "--nod: unknown option; did you mean --node?"),
        (["rehearse", "--stpes", "9"], "--stpes: unknown option; did you mean --steps?"),
        (
            ["rehearse", "--steps", "0", "train.py", "--lr", "1"],
            "--steps '0': expected a whole number, 1 or more, for example 8",
        ),
        (["status", "--every=3"], "--every: unknown option; elastic-hpc status --help lists all options"),
        (["why", FAULTS, "twice"], "'twice': unexpected argument; usage: elastic-hpc why [options] JOB"),
        (["resize", FAULTS], "expected NODES; usage: elastic-hpc resize [options] JOB NODES"),
        (["shell"], "expected JOB; usage: elastic-hpc shell [options] JOB [NODE] [COMMAND ...]"),
        (["logs", FAULTS, "-n", "x"], "--lines 'x': expected a whole number, 0 or more, for example 10"),
        (
            ["serve", "--port", "x"],
            "--port 'x': expected a port, 0 to 65535, where 0 stands for any free port; for example 9650",
        ),
        (["rehearse", "--steps", "0", "train.py"], "--steps '0': expected a whole number, 1 or more, for example 8"),
    ],
)
def test_bad_input_is_one_line_in_all_commands(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert main(argv) == 2
    assert capsys.readouterr() == ("", f"elastic-hpc: {message}\n")


@pytest.mark.parametrize("words", [["elastic-hpc", "logs"], ["elastic-sbatch"], ["elastic-srun"]])
def test_help_is_shown_whatever_follows_it(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMANDS[words[0]]([*words[1:], "--help", "--bogus"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: {' '.join(words)} ")


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_accepts_an_abbreviated_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--hel", "--vers"):
        assert COMMANDS[name]([option]) == 2
        assert capsys.readouterr().err.startswith(f"{name}: {option}: unknown option; ")


def test_commands_for_batch_scripts_alone_are_not_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nosuch"]) == 2
    assert main(["--help"]) == 0
    captured = capsys.readouterr()
    assert "conclude" not in captured.out + captured.err
    assert main(["conclude", "--help"]) == 0


def test_a_page_goes_to_stdout_alone_when_the_user_requests_that(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["timeline", FAULTS, "--html", "-"]) == 0
    page = capsys.readouterr().out
    assert page.startswith("<!")
    assert page.rstrip().endswith("</html>")


def test_json_is_the_same_on_every_terminal() -> None:
    done = called([*HPC, "status", "--json", FAULTS], stdout=subprocess.PIPE)
    assert json.loads(done.stdout)["jobs"]
