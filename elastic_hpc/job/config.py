"""Where settings come from: site, user and project files in TOML, the #SBATCH lines of the script, sbatch's variables
in the environment, then the command line. Reads files.

Later wins. Set-up lines add up in this order, environment variables by name; each value remembers its source::

    max-restarts = 5                       # any long option of elastic-sbatch
    grow = true                            # or "on"; false or "off"
    setup = ["module load cuda"]
    env = {NCCL_DEBUG = "INFO"}            # or ["NCCL_DEBUG=INFO"]
    [sbatch]
    partition = "gpu"                      # any long option of sbatch
    exclusive = true                       # true: without a value; false: not at all
    "--new-option" = "x"                   # one that only a newer sbatch knows, with its dashes
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from elastic_hpc.errors import UsageError
from elastic_hpc.job import toml_file
from elastic_hpc.options.sbatch import Given, check
from elastic_hpc.options.sbatch_environment import from_environment
from elastic_hpc.options.spec import LAUNCH_OPTIONS


def _python(text: str) -> tuple[str, ...]:
    """The interpreter and its options. A file that exists is one word, with blanks or without."""
    path = os.path.expanduser(text)
    try:
        words = [path] if os.path.isfile(path) else shlex.split(text)
    except ValueError:  # a quote that is not closed, a null byte
        words = []
    if not words or not words[0]:
        raise UsageError(
            f"--python {text!r}: expected a Python interpreter, for example --python python3, "
            "or with options of its own: --python 'python3 -X faulthandler'"
        )
    return os.path.expanduser(words[0]), *words[1:]


def _mounts(text: str) -> str:
    for mount in text.split(","):
        source, _, target = mount.partition(":")
        if not source or not target.startswith("/"):
            raise UsageError(
                f"--container-mounts {text!r}: expected SRC:DST[:FLAGS] with an absolute DST, separated by commas, for "
                "example --container-mounts /data:/data:ro,/scratch:/scratch"
            )
    return text


def _image(text: str) -> str:
    """A file is found from anywhere: a snapshot runs in another directory."""
    if not text:
        raise UsageError("--container-image '': expected an image, for example --container-image train.sif")
    path = os.path.expanduser(text)
    return os.path.abspath(path) if os.path.isfile(path) else path


def _runtime(text: str) -> str:
    if text not in CONTAINER_RUNTIMES:
        raise UsageError(f"--container-runtime {text!r}: expected {' or '.join(CONTAINER_RUNTIMES)}")
    return text


def _snapshot(text: str) -> bool:
    if text not in {"on", "off"}:
        raise UsageError(f"--snapshot {text!r}: expected on or off")
    return text == "on"


CONTAINER_RUNTIMES = ("pyxis", "apptainer")
_PARSERS: dict[str, Callable[[str], Any]] = {
    **{option.flag.removeprefix("--"): option.parse for option in LAUNCH_OPTIONS},
    "log-dir": os.path.expanduser,
    "template": os.path.expanduser,
    "python": _python,
    "container-image": _image,
    "container-mounts": _mounts,
    "container-runtime": _runtime,
    "snapshot": _snapshot,
}
SWITCHES = frozenset({"snapshot", *(option.flag.removeprefix("--") for option in LAUNCH_OPTIONS if option.is_switch)})
"""Options that are on or off: taken without a value too, in a TOML file true or false."""
KEYS = (*_PARSERS, *toml_file.LISTS)


@dataclass(frozen=True)
class Setting:
    """A value and where it came from."""

    value: Any
    source: str


@dataclass(frozen=True)
class Layer:
    """What one place says: our options by name, and sbatch's."""

    source: str
    options: Sequence[tuple[str, str]]
    sbatch: Sequence[Given]


@dataclass(frozen=True)
class Settings:
    """What all layers so far say. ``options`` by long name, parsed; ``sbatch`` in the order given."""

    options: Mapping[str, Setting] = field(default_factory=dict)
    setup: tuple[Setting, ...] = ()
    env: Mapping[str, Setting] = field(default_factory=dict)
    sbatch: tuple[Given, ...] = ()
    notes: tuple[str, ...] = ()
    """What the user should know of what was not taken, a line each."""

    def with_layer(
        self,
        source: str,
        options: Iterable[tuple[str, str]],
        sbatch: Sequence[Given] = (),
        unset: Collection[str] = (),
    ) -> Settings:
        """These settings with a layer on top. ``unset`` sbatch options of the layers below are taken back."""
        merged, setup, env = dict(self.options), list(self.setup), dict(self.env)
        for name, text in options:
            if name == "setup":
                setup.append(Setting(_setup_line(text), source))
            elif name == "env":
                variable, value = _variable(text)
                env[variable] = Setting(value, source)
            else:
                merged[name] = Setting(_PARSERS[name](text), source)
        replaced = {given.name for given in sbatch} | set(unset)
        kept = [given for given in self.sbatch if given.name not in replaced]
        nodes = merged["nodes"].value if "nodes" in merged else None
        fixed = nodes.max if nodes and nodes.min == nodes.max else None
        added = [given for given in sbatch if check(given, fixed)]
        return Settings(merged, tuple(setup), env, (*kept, *added), self.notes)


def _setup_line(text: str) -> str:
    if re.search(r"[\r\0]", text):
        raise UsageError(f"--setup {text!r}: sbatch refuses scripts with DOS line breaks; expected plain lines")
    return text


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or "\0" in value:
        raise UsageError(f"--env {text!r}: expected NAME=VALUE, for example --env OMP_NUM_THREADS=8")
    return name, value


def load(environ: Mapping[str, str], directory: Path, script: Sequence[Layer] = ()) -> Settings:
    """The settings of the site's, the user's and the project's file, as far as they exist, then those of ``script``,
    such as its #SBATCH lines, then those of sbatch's own variables: as for sbatch, these win over the script.
    """
    settings = Settings()
    site = environ.get("ELASTIC_HPC_CONFIG")
    if site:
        settings = _with_file(settings, Path(site), site)
    home = Path(environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"))
    for path, source in (
        (home / "elastic_hpc" / "config.toml", str(home / "elastic_hpc" / "config.toml")),
        (directory / "elastic_hpc.toml", "./elastic_hpc.toml"),
    ):
        if path.exists():
            settings = _with_file(settings, path, source)
    for layer in script:
        try:
            settings = settings.with_layer(layer.source, layer.options, layer.sbatch)
        except UsageError as error:
            raise UsageError(f"{layer.source}: {error}") from None
    given, notes = from_environment(environ)
    return replace(settings.with_layer("environment", (), given), notes=tuple(notes))


def _with_file(settings: Settings, path: Path, source: str) -> Settings:
    try:
        content = toml_file.read(path, source, KEYS, SWITCHES)
        return settings.with_layer(source, content.options, content.sbatch, content.unset)
    except UsageError as error:
        raise UsageError(f"configuration file {source}: {error}") from None
