"""The batch script of a job, from a Jinja2 template. Reads templates."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from elastic_hpc import __version__
from elastic_hpc.errors import UsageError
from elastic_hpc.job import recorded
from elastic_hpc.job.commands import agent_command, agent_options, srun_options, torchrun_command
from elastic_hpc.job.quoting import Shell, comment, directive, quote, quote_all
from elastic_hpc.job.spec import JobSpec
from elastic_hpc.start import module_command


def template_folder() -> Path:
    """The built-in templates: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parent.parent
    packaged = package / "slurm_templates"
    return packaged if packaged.is_dir() else package.parent / "slurm_templates"


def built_in_templates() -> list[str]:
    return sorted(path.name.removesuffix(".sbatch.j2") for path in template_folder().glob("*.sbatch.j2"))


def _words(job: JobSpec) -> dict[str, Any]:
    """The commands that a template can use, as lists of words, and the options of the agents with their values."""
    head, run_dir = Shell('"$head_node"'), Shell('"$run_dir"')
    srun = srun_options(
        Shell('"$SLURM_JOB_NUM_NODES"'), Shell('"$SLURM_CPUS_PER_TASK"') if job.has("cpus-per-task") else None
    )
    box, python = job.container, job.agent_python or ("python3" if job.container else job.python,)
    options = agent_options(job.launch, head)
    agent = agent_command(job.launch, head=head, run_dir=run_dir, python=python, contained=box is not None)
    torchrun = torchrun_command(
        job.launch,
        head=head,
        job_id=Shell('"$SLURM_JOB_ID"'),
        python=python,
        log_dir=job.log_dir if "log-dir" in job.sources else None,
        others=job.torchrun,
    )
    if box:
        folders = "$PWD:$PWD" + (",$run_dir:$run_dir" if job.template != "torchrun" else "")
        srun += box.srun_options(folders, job.env)
        agent = box.around(agent, folders, job.env, gpus=job.asks_for_gpus)
        torchrun = box.around(torchrun, folders, job.env, gpus=job.asks_for_gpus)
    return {
        "python": job.python,
        "srun_options": srun,
        "agent_command": agent,
        "with_array": functools.partial(_with_array, [*chain.from_iterable(options)]),
        "agent_options": [_row(job, *option) for option in options],
        "torchrun_command": torchrun,
    }


_ALSO = {
    "--nodes": "; #SBATCH --nodes must match",
    "--spares": "; #SBATCH --nodes must match",
    "--grace": "; #SBATCH --signal comes at least 30 s earlier",
}
"""Other lines of a batch script that depend on an option, for users who edit the script."""


def _row(job: JobSpec, flag: str, value: str) -> tuple[str, str]:
    """An option of the agents for bash, and the reason for its value."""
    word = quote(value)
    if flag == "--max-requeues":
        word = '"$max_requeues"'
    elif word == value and "," in value:
        word = f"'{value}'"  # a comma does not separate array elements
    return f"{flag} {word}", job.source(flag) + _ALSO.get(flag, "")


def _with_array(options: Sequence[str], command: Sequence[str]) -> Sequence[str]:
    """``command`` with the bash array agent_options in place of ``options``. Raises UsageError if it lacks them."""
    for at in range(len(command)):
        if command[at : at + len(options)] == options:
            return [*command[:at], Shell('"${agent_options[@]}"'), *command[at + len(options) :]]
    raise UsageError("with_array: expected agent_command, with all its options and words before or after it")


@functools.cache
def _templates(folder: Path) -> Any:
    """The environment of the templates in ``folder``, which override the built-in ones. A program that submits many
    jobs compiles a template once, and again when its file has changed.
    """
    import jinja2

    from elastic_hpc.job.compiled import cache

    environment = jinja2.Environment(
        bytecode_cache=cache(),
        loader=jinja2.FileSystemLoader([folder, template_folder()]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701  (the output is a shell script; `quote` is applied to every value)
    )
    environment.filters.update(quote=quote, quote_all=quote_all, comment=comment)
    environment.globals.update(directive=directive, module_command=module_command)
    return environment


def render(job: JobSpec) -> str:
    """The batch script of ``job``. Raises UsageError if a template is missing or broken, or a value does not fit."""
    import jinja2

    path = Path(job.template)
    if job.template in built_in_templates():
        path = template_folder() / f"{job.template}.sbatch.j2"
    elif not path.is_file():
        known = ", ".join(built_in_templates())
        raise UsageError(f"--template {job.template!r}: expected {known}, or a file that exists")
    try:
        template = _templates(path.parent).get_template(path.name)
        text: str = template.render(version=__version__, job=job, launch=job.launch, **_words(job))
    except jinja2.TemplateSyntaxError as error:
        raise UsageError(f"--template {job.template}: line {error.lineno}: {error.message}") from None
    except jinja2.TemplateError as error:
        raise UsageError(f"--template {job.template}: {error.message}") from None
    except OSError as error:
        raise UsageError(f"--template {job.template}: {error.strerror}") from None
    return recorded.with_record(text, job)
