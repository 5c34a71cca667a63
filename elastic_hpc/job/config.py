"""Where settings come from, in this order: site, user and project files in TOML, the #SBATCH lines of the script,
sbatch's variables in the environment, the command line. Reads files.

A later source overrides an earlier one, but set-up lines accumulate in this order, and environment variables by name.
Each value remembers its source::

    max-restarts = 5                       # any long option of elastic-sbatch
    grow = true                            # or "on"; false or "off"
    setup = ["module load cuda"]
    env = {NCCL_DEBUG = "INFO"}            # or ["NCCL_DEBUG=INFO"]
    [sbatch]
    partition = "gpu"                      # any long option of sbatch
    exclusive = true                       # true: without a value; false: not at all
    "--new-option" = "x"                   # an option that only a newer sbatch knows, with its dashes
    [grow]                                 # in place of grow = true above
    on = true                              # the same as grow = true
    every = 300                            # as grow-every
    partition = "preempt"                  # any long option of sbatch, for the jobs by which a job grows

The file of one job, for ``elastic-sbatch --file job.toml``, is written in the same way. It overrides all but the
command line, and may also say what runs::

    script = "train.py"                    # from the working directory, as on the command line
    args = ["--lr", "1e-3"]
    module = false                         # true: script is a module, as for -m; also no-python

``elastic-hpc config`` shows the values in effect, and where each comes from.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from elastic_hpc.errors import UsageError
from elastic_hpc.job import toml_file
from elastic_hpc.options.of_joiners import check_for_joiners
from elastic_hpc.options.sbatch import Given, check
from elastic_hpc.options.sbatch_environment import from_environment
from elastic_hpc.options.table import ELASTIC, Layer


@dataclass(frozen=True)
class Setting:
    """A value and its source."""

    value: Any
    source: str


@dataclass(frozen=True)
class Configuration:
    """The merged settings of several layers. ``options``: our options, parsed. ``sbatch``: in the order given."""

    options: Mapping[str, Setting] = field(default_factory=dict)
    setup: tuple[Setting, ...] = ()
    env: Mapping[str, Setting] = field(default_factory=dict)
    sbatch: tuple[Given, ...] = ()
    notes: tuple[str, ...] = ()
    """Settings that were dropped, and why: a line each, for the user."""

    def with_layer(self, layer: Layer) -> Configuration:
        """The settings with ``layer`` on top."""
        merged, setup, env = dict(self.options), list(self.setup), dict(self.env)
        for name, text in layer.options:
            value = _value(name, text)
            if name == "setup":
                setup.append(Setting(value, layer.source))
            elif name == "env":
                env[value[0]] = Setting(value[1], layer.source)
            else:
                merged[name] = Setting(value, layer.source)
        replaced = {given.name for given in layer.sbatch} | set(layer.unset)
        kept = [given for given in self.sbatch if given.name not in replaced]
        nodes = merged["nodes"].value if "nodes" in merged else None
        fixed = nodes.max if nodes and nodes.min == nodes.max else None
        for given in layer.sbatch:
            check_for_joiners(given)
        added = [given for given in layer.sbatch if check(given, fixed)]
        return Configuration(merged, tuple(setup), env, (*kept, *added), self.notes)


def _value(name: str, text: str) -> Any:
    """The value that ``text`` gives to our option ``name``. ``~`` in a path is the home directory. The path of an image
    that is a file becomes absolute, because a snapshot runs in another folder.
    """
    path = os.path.expanduser(text)
    if name in {"log-dir", "template"}:
        return path
    if name == "python":  # the path of an existing file is one word, even with blanks
        program, *options = (path,) if os.path.isfile(path) else ELASTIC[name].parse(text)
        return os.path.expanduser(program), *options
    if name == "container-image":
        return os.path.abspath(path) if os.path.isfile(path) else ELASTIC[name].parse(path)
    return ELASTIC[name].parse(text)


def load(environ: Mapping[str, str], directory: Path, script: Sequence[Layer] = ()) -> Configuration:
    """The settings that the caller's options override: from the files of the site, the user and the project, if they
    exist; then ``script``, such as its #SBATCH lines; then sbatch's variables, which override the script as for sbatch.
    """
    configuration = Configuration()
    for name, (path, source) in files(environ, directory).items():
        if name == "site" or path.exists():
            configuration = _with_file(configuration, path, source)
    for layer in script:
        try:
            configuration = configuration.with_layer(layer)
        except UsageError as error:
            raise UsageError(f"{layer.source}: {error}") from None
    given, notes = from_environment(environ)
    return replace(configuration.with_layer(Layer("environment", (), given)), notes=tuple(notes))


def files(environ: Mapping[str, str], directory: Path) -> dict[str, tuple[Path, str]]:
    """The configuration files in the order in which they are read, and how messages call them. The site's file is
    included only if the environment names it; the others may not exist.
    """
    site = environ.get("ELASTIC_HPC_CONFIG")
    home = Path(environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")) / "elastic_hpc" / "config.toml"
    of_site = {"site": (Path(site), site)} if site else {}
    return {**of_site, "user": (home, str(home)), "project": (directory / "elastic_hpc.toml", "./elastic_hpc.toml")}


def _with_file(configuration: Configuration, path: Path, source: str) -> Configuration:
    try:
        return configuration.with_layer(toml_file.read(path, source))
    except UsageError as error:
        raise UsageError(f"configuration file {source}: {error}") from None
