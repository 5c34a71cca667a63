"""``elastic-hpc timeline``: a job as a page or an image."""

from __future__ import annotations

import argparse
import os
import sys
import time

from elastic_hpc.cli.jobs import add_job, nothing_to_show, single
from elastic_hpc.errors import ElasticError, UsageError
from elastic_hpc.job.look import Jobs
from elastic_hpc.view.timeline import html, png

HELP = "draw a job over time: world size, faults, progress and goodput"
EPILOG = """examples:
  elastic-hpc timeline 4711 --html 4711.html       one self-contained page
  elastic-hpc timeline 4711 --html - | mail ...    the same page, to stdout
  elastic-hpc timeline 4711 --png 4711.png         only the picture

--png needs: pip install 'elastic_hpc[png]'"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job(parser)
    parser.add_argument("--html", metavar="FILE", help="write a page to FILE; - is stdout")
    parser.add_argument("--png", metavar="FILE", help="write a picture to FILE; - is stdout")


def run(args: argparse.Namespace) -> int:
    if not (args.html or args.png):
        raise UsageError(f"expected --html FILE or --png FILE, for example --html {args.job.path.name}.html")
    if args.html == args.png:
        raise UsageError(f"--html {args.html} --png {args.png}: expected two different files")
    (look,) = Jobs([single("timeline", args.job)]).look()
    if not args.job.path.is_dir():
        raise nothing_to_show(look)
    view, story, _ = look
    if args.html:
        _write(args.html, html(view, story, time.time()).encode(errors="replace"))
    if args.png:
        _write(args.png, png(view, story, time.time()))
    return 0


def _write(path: str, body: bytes) -> None:
    if path == "-":
        sys.stdout.buffer.write(body)
        return
    try:
        with open(path, "wb") as file:
            file.write(body)
    except OSError as error:
        raise ElasticError(f"{path}: {error.strerror}") from error
    print(os.path.abspath(path))
