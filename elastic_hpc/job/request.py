"""A caller's request on top of the configuration; where its script is; which options are in effect. Reads the
configuration files and the script.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from elastic_hpc.errors import NO_FOLDER, UsageError
from elastic_hpc.job import programs
from elastic_hpc.job.config import Configuration, Setting, load
from elastic_hpc.job.quoting import Shell
from elastic_hpc.job.script_file import not_python
from elastic_hpc.options.from_python import PYTHON
from elastic_hpc.options.sbatch import INSTEAD_OF_CONTAINER, Given, is_for_containers, last
from elastic_hpc.options.sbatch_lines import directives_of_python
from elastic_hpc.options.table import NEEDS, NOT_FOR_TORCHRUN, Layer
from elastic_hpc.options.torchrun import unneeded

_CONTAINER = (
    f"it would put the batch script itself into a container, where srun and scontrol are not; {INSTEAD_OF_CONTAINER}, "
    "else with --container-mounts SRC:DST, in a configuration file above [sbatch]; the working "
    "directory is that of --chdir; whatever else pyxis can do belongs on the srun line of a template of your own"
)


@dataclass(frozen=True)
class Request:
    """A job as a caller requests it: the command line, a call in Python, the doctor."""

    script: str
    script_args: Sequence[str]
    options: Sequence[tuple[str, str]]
    """Our options by name, and their values."""
    sbatch: Sequence[Given]
    source: str
    """The caller, as named beside each value in the batch script."""
    module: bool = False
    no_python: bool = False
    torchrun: Sequence[Given] = ()
    """Options of torchrun that have no counterpart here."""
    of_script: Sequence[Layer] = ()
    """The layers that the script itself sets."""
    notes: Sequence[str] = ()
    """Notes for the user, a line each."""
    folder: str | None = ""
    """The folder to which the set-up lines change, relative to the working directory; None if it is not known."""
    unset: Collection[str] = ()
    """Options of sbatch that the job must not have, even if a file sets them."""
    job_file: Layer | None = None
    """The options of the file that describes the job."""
    resumed: Layer | None = None
    """The options of the submission that this request resumes. They replace those of files and the environment."""
    directory: Path | None = None
    """The folder from which the job is submitted; None for the working directory."""


@dataclass(frozen=True)
class Place:
    """Where a job runs, and what it runs there."""

    script: str
    """The script as the job finds it."""
    work_dir: str
    submitted_from: Path
    note: str
    """A note for the user about the script, or empty."""


def layers_of(script: str, chdir: str | None) -> list[Layer]:
    """The layers of a Python script's #SBATCH lines. Empty if the script cannot be read: ``located`` refuses it."""
    found = [path for path in (os.path.join(chdir or "", script), script) if os.path.isfile(path)]
    try:
        content = Path(found[0]).read_bytes() if found else b""
    except OSError:
        return []
    if not_python(content, script):
        return []
    return [
        Layer(g.source, [("nodes", g.value or "")]) if g.name == "nodes" else Layer(g.source, [], [g])
        for g in directives_of_python(content, script)
    ]


def configured(request: Request) -> Configuration:
    """All settings: ``request`` overrides the configuration files, the script and the environment."""
    if request.module and request.no_python:
        raise UsageError("--no-python with --module: a module needs Python; leave out one of the two options")
    if request.script == ":":
        raise UsageError("':': heterogeneous jobs are not elastic; submit one job with --nodes MIN:MAX")
    if request.resumed:
        configuration = Configuration().with_layer(request.resumed)
    else:
        try:
            directory = Path.cwd()
        except FileNotFoundError:
            raise UsageError(NO_FOLDER) from None
        configuration = load(os.environ, directory, request.of_script)
    if request.job_file:
        try:
            configuration = configuration.with_layer(request.job_file)
        except UsageError as error:
            raise UsageError(f"--file {request.job_file.source}: {error}") from None
    return configuration.with_layer(Layer(request.source, request.options, request.sbatch, request.unset))


def located(request: Request, configuration: Configuration) -> Place:
    """The script, as it is found from the folder in which the job runs. Raises UsageError if it is not there."""
    directory, script, note = request.directory or Path.cwd(), request.script, ""
    work_dir = os.path.normpath(os.path.join(directory, last(configuration.sbatch, "chdir") or "."))
    runs_in = os.path.normpath(os.path.join(work_dir, request.folder or ""))
    looked_in = Path(runs_in) if request.folder else directory
    if request.module:
        programs.check_module(script)
    elif request.folder is None or isinstance(script, Shell):
        pass  # unknown without running the set-up lines
    elif request.no_python:
        script = programs.find_program(script, runs_in, looked_in)
    else:
        script, note = programs.find_script(script, runs_in, looked_in)
    return Place(script, work_dir, directory, note)


def effective(request: Request, configuration: Configuration) -> dict[str, Setting]:
    """Our options; for a plain torchrun, without options from files that only elastic jobs use. Raises UsageError for
    an option that this job cannot have.
    """
    options = dict(configuration.options)
    if "nodes" not in options:
        if request.source == PYTHON:
            raise UsageError("nodes: missing, for example nodes='2:4'")
        raise UsageError("--nodes: missing before the script, for example --nodes 2:4")
    for name, other in NEEDS.items():  # a file may set one for jobs that have the other
        if name in options and options[name].source == request.source and other not in options:
            raise UsageError(f"--{name}: has no effect without --{other}; add that, or leave it out")
    if "template" in options and options["template"].value == "torchrun":
        _refuse_for_torchrun(configuration, request.source)
        options = {name: setting for name, setting in options.items() if name not in NOT_FOR_TORCHRUN}
    else:
        for given in request.torchrun:
            unneeded(given)
    for given in configuration.sbatch:
        if is_for_containers(given.name):
            raise UsageError(f"{given} ({given.source}): {_CONTAINER}")
    return options


def _refuse_for_torchrun(configuration: Configuration, source: str) -> None:
    given = {name for name, setting in configuration.options.items() if setting.source == source}
    given |= {g.name for g in configuration.sbatch if g.source == source}
    for name in NOT_FOR_TORCHRUN:
        if name in given:
            raise UsageError(f"--{name}: plain torchrun has no use for it; leave it out, or use --template elastic")
    nodes = configuration.options["nodes"].value
    if nodes.sizes:
        raise UsageError(
            f"--nodes {nodes}: plain torchrun expects N or MIN:MAX, for example --nodes {nodes.min}:{nodes.max}; "
            "for exact numbers use --template elastic"
        )
