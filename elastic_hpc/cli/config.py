"""``elastic-hpc config``: which settings are in effect, and where each comes from."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elastic_hpc.cli.sbatch import job_file
from elastic_hpc.errors import UsageError, argument
from elastic_hpc.job.config import Configuration, files
from elastic_hpc.job.request import Request, configured
from elastic_hpc.options.sbatch import COMMAND_LINE
from elastic_hpc.options.spec import LaunchSpec, as_text
from elastic_hpc.options.table import ELASTIC

HELP = "show the settings that a submission from here would use, and the source of each value"
EPILOG = """examples:
  elastic-hpc config
  elastic-hpc config --all | grep grace
  elastic-hpc config --file job.toml     as for elastic-sbatch --file job.toml

Later sources override earlier ones: the site's file, yours, the project's, sbatch's variables such as SBATCH_PARTITION,
a --file. This command does not know the command line of elastic-sbatch, which overrides all of these, nor the #SBATCH
lines of a script, which override only the files of the site, the user and the project. elastic-sbatch --dry-run shows
both, beside each option of the batch script."""


_SECRET = re.compile("KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
"""Words in the name of a variable whose value is a secret: users send this output to others."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="?", type=argument(_show), metavar="show", help="may be left out")
    parser.add_argument("--file", metavar="FILE", help="a job file, as for elastic-sbatch --file")
    parser.add_argument("--all", action="store_true", help="include options that have their default")
    parser.add_argument("--json", action="store_true", help="print one JSON object, with a list of settings")


def _show(word: str) -> str:
    if word != "show":
        raise UsageError(f"{word}: expected no argument, or show: elastic-hpc config show")
    return word


def run(args: argparse.Namespace) -> int:
    layer = job_file(args.file).layer if args.file else None
    configuration = configured(Request("", [], [], [], COMMAND_LINE, job_file=layer))
    rows = [*_ours(configuration, with_defaults=args.all), *_others(configuration)]
    if args.json:
        settings = [{"option": flag, "value": value, "source": source} for flag, value, source in rows]
        print(json.dumps({"schema": 1, "settings": settings}, indent=1))
        return 0
    if not os.environ.get("ELASTIC_HPC_CONFIG"):
        print("site     $ELASTIC_HPC_CONFIG is not set")
    for name, (path, source) in files(os.environ, Path.cwd()).items():
        print(f"{name:<9}{source}" + ("" if path.exists() else "  (not there)"))
    print()
    width = max((len(_word(flag, value)) for flag, value, _ in rows), default=0)
    for flag, value, source in rows:
        print(f"{_word(flag, value):<{min(width, 48)}}  {source}")
    for note in configuration.notes:
        print(f"note: {note}")
    if not rows:
        print("no setting is given: all options have their defaults (--all shows them)")
    return 0


def _word(flag: str, value: str | None) -> str:
    """The setting as a user would type it."""
    return flag if value is None else f"{flag}={shlex.quote(value)}"


def _ours(configuration: Configuration, *, with_defaults: bool) -> Iterator[tuple[str, str | None, str]]:
    defaults: dict[str, Any] = vars(LaunchSpec("")) if with_defaults else {}
    for name, option in ELASTIC.items():
        if setting := configuration.options.get(name):
            yield option.flag, _text(name, setting.value), setting.source
        elif with_defaults and name == "nodes":
            yield option.flag, None, "no default: elastic-sbatch needs it"
        elif with_defaults and not option.repeated:
            default = re.search(r"\(default: (.*)\)$", option.help)
            value = defaults.get(option.dest)
            yield option.flag, None if value is None else as_text(value), f"default{_of(default, value)}"
    for line in configuration.setup:
        yield "--setup", line.value, line.source
    for name, setting in configuration.env.items():
        yield "--env", f"{name}={'...' if _SECRET.search(name) else setting.value}", setting.source


def _of(default: re.Match[str] | None, value: object) -> str:
    """What the help says about a default that is not a plain value."""
    return f": {default[1]}" if default and value is None else ""


def _others(configuration: Configuration) -> Iterator[tuple[str, str | None, str]]:
    for given in configuration.sbatch:
        yield given.flag, given.value, given.source


def _text(name: str, value: Any) -> str:
    if name == "python":
        return shlex.join(value)
    if name == "notify":  # the path of a webhook is a secret, and users send this output to others
        return re.sub(r"^(https?://[^/]+/).+", r"\1...", value)
    return as_text(value)
