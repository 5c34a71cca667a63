"""The type of a training script is recognized by its content."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from elastic_hpc.cli import srun
from elastic_hpc.cli.hpc import main as hpc
from elastic_hpc.cli.sbatch import main as sbatch
from elastic_hpc.errors import UsageError
from elastic_hpc.job.script_file import check_script

BATCH = "#SBATCH --nodes=4\n\nsrun torchrun --nnodes 4 train.py\n"
FROM_BATCH = "elastic-sbatch --from-batch train.py makes an elastic job of a batch script with a torchrun line"


def refusal(content: bytes | str, folder: Path) -> str:
    (folder / "train.py").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError) as refused:
        check_script("train.py", str(folder))
    return str(refused.value).removeprefix("script 'train.py': ")


@pytest.mark.parametrize(
    ("first", "shell"),
    [
        ("#!/bin/bash", "bash"), ("#!/bin/bash -l", "bash"), ("#! /bin/sh", "sh"), ("#!/usr/bin/env bash", "bash"),
        ("#!/usr/bin/env -S bash -eu", "bash"), ("#!/usr/bin/zsh", "zsh"), ("#!/bin/tcsh -f", "tcsh"),
        ("#!/bin/csh", "csh"), ("\ufeff#!/bin/bash", "bash"), ("#!/bin/bash\r", "bash"),
    ],
)  # fmt: skip
def test_a_batch_script_is_recognized_and_the_refusal_shows_what_to_type(
    tmp_path: Path, first: str, shell: str
) -> None:
    said = f"a script for {shell}, not a Python file; {FROM_BATCH}"
    assert refusal(f"{first}\n{BATCH}", tmp_path) == said
    assert refusal(f"{first}\n#SBATCH --nodes=4\n", tmp_path) == said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"module load cuda\n{BATCH}", f"a shell script, not a Python file; {FROM_BATCH}"),
        (BATCH, f"a shell script, not a Python file; {FROM_BATCH}"),
        ("# LR\nexport LR=1\npython train.py", f"a shell script, not a Python file; {FROM_BATCH}"),
        ("#!/usr/bin/perl\n", "a script for perl; expected a Python file"),
        (b"", "the file is empty; expected a Python file"),
        (b" \n\n", "the file is empty; expected a Python file"),
        (b"\x7fELF\2\1\1\0", "a compiled program; expected a Python file, or with --no-python a program"),
        ("import os".encode("utf-16"), "UTF-16 text, which Python does not read; save it as UTF-8"),
        (b"\x80\x04\x95\0\0", "binary data; expected a Python file"),
        ('{\n "cells": [],\n "nbformat": 4}', "a notebook; make a Python file of it: jupyter nbconvert --to script"),
    ],
)
def test_for_a_file_that_is_no_python_the_message_names_its_type(
    tmp_path: Path, content: bytes | str, message: str
) -> None:
    assert refusal(content, tmp_path).startswith(message)


@pytest.mark.parametrize(
    "content",
    [
        "#!/usr/bin/env python3\nprint(1)", "#!/opt/conda/bin/python3.11 -u\n", "#!/usr/bin/env -S uv run --script\n",
        "#!/usr/bin/env torchrun\n", "\ufeffprint('BOM')", "# only a comment", "#SBATCH --nodes=4\nimport os",
        '"""\nsrun python train.py\nmodule load cuda\n"""\nimport os\ndef f[T](x: T): ...', "x=1\nprint(x)",
        "#!/bin/sh\n'''exec' /a/very/long/python \"$0\" \"$@\"\n' '''\nimport os", '#!/bin/sh\n"exec" "python3" "$0"\n',
        '{"lr": 1}', "source = 1\nsyntax error of a newer Python",
    ],
)  # fmt: skip
def test_python_is_recognized_whatever_its_first_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "train.sh").write_text(content)
    check_script("train.sh", str(tmp_path))


def test_an_archive_is_accepted_and_a_file_that_other_nodes_cannot_read_is_not(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "train.pyz", "w") as archive:
        archive.writestr("__main__.py", "pass")
    check_script("train.pyz", str(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    for name, reason in {"pipe": "no regular file", ".": "Is a directory", "none": "No such file or directory"}.items():
        with pytest.raises(UsageError, match=f"script '{name}': {reason}"):
            check_script(name, str(tmp_path))


def test_every_command_that_takes_a_script_refuses_a_batch_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    (tmp_path / "job.sh").write_text(f"#!/bin/bash\n{BATCH}")
    assert sbatch(["-N2", "job.sh"]) == srun.main(["--standalone", "job.sh"]) == hpc(["rehearse", "job.sh"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    said = "script 'job.sh': a script for bash, not a Python file; elastic-sbatch --from-batch job.sh"
    assert [said in line for line in err.splitlines()] == [True] * 3
