"""``elastic-hpc metrics``: jobs for Prometheus."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, start_http_server, write_to_textfile
from prometheus_client.exposition import generate_latest

from elastic_hpc.cli.jobs import add_job, looks_of
from elastic_hpc.errors import ElasticError, UsageError, argument, of_option
from elastic_hpc.job.look import Jobs
from elastic_hpc.options.durations import seconds
from elastic_hpc.options.values import port
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.view.job import JobView
from elastic_hpc.view.metrics import JobMetrics
from elastic_hpc.view.story import Story

HELP = "export Prometheus metrics of your jobs: goodput, faults, restarts, lost time"
EPILOG = """examples:
  elastic-hpc metrics                      print the metrics
  elastic-hpc metrics --port 9650          serve them on this machine
  elastic-hpc metrics --output DIR/elastic_hpc.prom --every 30
      for the textfile collector of node_exporter

--port and --every run until Ctrl-C.
Goodput of all jobs:  sum(elastic_hpc_node_seconds_total{kind="kept"}) / sum(elastic_hpc_node_seconds_total)"""


_LOCAL = "127.0.0.1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job(parser, "*")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--output", metavar="FILE", help="write the metrics to FILE, replaced atomically")
    how.add_argument(
        "--port", type=argument(of_option("--port", port)), metavar="PORT", help="serve the metrics over HTTP"
    )
    parser.add_argument(
        "--every",
        type=argument(seconds("--every")),
        metavar="TIME",
        help="with --output: interval at which FILE is written again, until Ctrl-C; in seconds, or as 5m",
    )
    parser.add_argument(
        "--address",
        metavar="ADDRESS",
        help=f"with --port: address to listen on (default: {_LOCAL})",
    )


def run(args: argparse.Namespace) -> int:
    if args.every is not None and args.output is None:
        raise UsageError(f"--every {args.every:g}: is for --output FILE; add that, or leave it out")
    if args.every is not None and args.every > threading.TIMEOUT_MAX:
        raise UsageError(f"--every {args.every:g}: expected at most {threading.TIMEOUT_MAX:.0f} seconds")
    if args.address is not None and args.port is None:
        raise UsageError(f"--address {args.address}: is for --port PORT; add that, or leave it out")
    registry = CollectorRegistry()
    jobs, scrape = Jobs([], also_unreadable=not args.job), threading.Lock()
    registry.register(JobMetrics(lambda: _look(jobs, list(args.job), scrape)))
    if args.port is not None:
        return _serve(registry, args.address or _LOCAL, args.port)
    if args.output is None:
        sys.stdout.buffer.write(generate_latest(registry))
        return 0
    _write(registry, args.output)
    if args.every is not None:
        interrupted = _until_ctrl_c()
        while not interrupted.wait(args.every):
            _write(registry, args.output)
    return 0


def _look(jobs: Jobs, run_dirs: Sequence[RunDir], scrape: threading.Lock) -> tuple[list[tuple[JobView, Story]], bool]:
    """``scrape``: a lock, because scrapes may run at the same time, and ``jobs`` keeps what it has read. Leaves out
    jobs whose records cannot be read: their counters would fall to 0.
    """
    with scrape:
        looks = looks_of(jobs, run_dirs)
        return [look[:2] for look in looks if look.view.run_dir not in jobs.unreadable], not jobs.problem


def _write(registry: CollectorRegistry, path: str) -> None:
    try:
        write_to_textfile(path, registry)
    except OSError as error:
        raise ElasticError(f"{path}: {error.strerror}") from error


def _serve(registry: CollectorRegistry, address: str, at: int) -> int:
    try:
        server, thread = start_http_server(at, address, registry)
    except OSError as error:
        raise ElasticError(
            f"--address {address} --port {at}: {error.strerror}; expected an address of this machine and a free port, "
            "for example --port 9650"
        ) from error
    print(f"http://{address}:{server.server_port}/metrics, until Ctrl-C", file=sys.stderr, flush=True)
    _until_ctrl_c().wait()
    server.shutdown()
    server.server_close()
    thread.join()
    return 0


def _until_ctrl_c() -> threading.Event:
    interrupted = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: interrupted.set())
    return interrupted
