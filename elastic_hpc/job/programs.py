"""What a job runs: finds its script, program or interpreter from the folder in which the job runs. Reads files."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from elastic_hpc.errors import UsageError
from elastic_hpc.job.script_file import check_script

# Environments that exist as long as a command runs (uv run --with, --isolated), and environments in a cache (uvx,
# scripts with dependencies of their own, pipx run).
_TEMPORARY = re.compile(r"/builds-v\d+/\.tmp")
_CACHED = re.compile(r"/(archive|environments)-v\d+/|/pipx/(\.cache/)?[0-9a-f]{15}(/|$)")
_NODES_OWN = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - nothing is written there
_DISTRIBUTIONS = ("block", "cyclic", "arbitrary")  # values of sbatch's own -m, --distribution


def check_module(name: str) -> None:
    if name in _DISTRIBUTIONS or not all(part.isidentifier() for part in name.split(".")):
        raise UsageError(
            f"-m {name!r}: expected the name of a Python module; sbatch's -m is written --distribution={name} here"
        )


def find_script(script: str, work_dir: str, submitted_from: Path) -> tuple[str, str]:
    """``script`` as the job finds it in ``work_dir``, and a note for the user, or an empty text. With --chdir, as for
    sbatch, the script may be in the folder of the submission.
    """
    folders = list(dict.fromkeys((work_dir, str(submitted_from))))
    places = [os.path.join(folder, script) for folder in folders]
    found = [place for place in places if os.path.exists(place)]
    if not found and len(places) > 1:
        raise UsageError(f"script {script!r}: No such file or directory, neither here nor in --chdir {work_dir}")
    if not found or found[0] == places[0]:
        check_script(script, work_dir)
        both = len(found) > 1 and places[0] != places[1]
        return script, f"the job runs {places[0]}, in the folder of --chdir; there is also {places[1]}" if both else ""
    check_script(script, folders[1])
    return places[1], f"the job runs {places[1]}: the folder of --chdir has no such script"


def find_program(program: str, work_dir: str, submitted_from: Path) -> str:
    """``program`` of --no-python: a path is found like a script, a name on the PATH of the nodes."""
    if os.sep not in program:
        if os.path.isfile(os.path.join(work_dir, program)) and shutil.which(program) is None:
            raise UsageError(f"--no-python {program}: is not on PATH; expected ./{program}, or leave out --no-python")
        return program
    for folder in dict.fromkeys((work_dir, str(submitted_from))):
        place = os.path.join(folder, program)
        if os.path.isfile(place) and os.access(place, os.X_OK):
            return program if folder == work_dir else place
    raise UsageError(f"--no-python {program}: expected a program that can be run, for example --no-python bash run.sh")


def find_interpreter(words: Sequence[str], work_dir: str, submitted_from: Path) -> tuple[str, ...]:
    """The words of --python. A path that leads to a file only from the folder of the submission becomes absolute."""
    here = os.path.join(submitted_from, words[0])
    if os.sep in words[0] and not os.path.isfile(os.path.join(work_dir, words[0])) and os.path.isfile(here):
        return here, *words[1:]
    return tuple(words)


def is_temporary(prefix: str) -> bool:
    """Whether an environment is gone when the command ends."""
    return _TEMPORARY.search(prefix) is not None


def environment_that_lasts(prefix: str, work_dir: str, *, other: bool) -> str:
    """A note for the user if the nodes may not have ``prefix``, the environment that submits and that the job uses;
    else empty. ``other``: agents and workers have another interpreter. Raises UsageError if ``prefix`` will be gone.
    """
    advice = "expected the environment in which you train: install elastic_hpc there, with uv add or uv pip install"
    if is_temporary(prefix):
        if other:
            return ""
        raise UsageError(f"elastic-sbatch runs in {prefix}, which uv removes when the command ends; {advice}")
    if _CACHED.search(prefix):
        return f"the job runs in {prefix}, a cache, which may be cleaned before the job starts; {advice}"
    own = [folder for folder in _NODES_OWN if prefix.startswith(f"{folder}/") and not work_dir.startswith(f"{folder}/")]
    return f"the job runs in {prefix}: each node has its own {own[0]}; {advice}" if own else ""
