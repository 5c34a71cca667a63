"""``elastic-hpc serve``: jobs in a browser, as they run."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import hmac
import secrets
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from elastic_hpc.cli import entry
from elastic_hpc.cli.jobs import add_job, looks_of
from elastic_hpc.errors import ElasticError, argument, of_option
from elastic_hpc.job.handle import Job, why
from elastic_hpc.job.look import Jobs, Look
from elastic_hpc.options.values import port
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.record.worker_logs import Logs, Wanted
from elastic_hpc.view.live import ACTIONS, job_page, jobs_page

HELP = "show your jobs in a browser, as they run: timeline, output, why, drain and stop"
EPILOG = """examples:
  elastic-hpc serve                 active jobs, and those of the last day
  elastic-hpc serve 4711 4712

The command prints an address with a secret in it. The address works on this machine, until Ctrl-C. Whoever knows it
can read the jobs' output and stop the jobs. To open the address on your own machine, first type the ssh command that is
printed; it opens a tunnel."""

_LOOK_INTERVAL, _SLURM_INTERVAL = 1.0, 10.0
"""Seconds between two looks at the jobs, and between two queries of Slurm, however many pages are open."""
_ACTIONS = {action.name for action in ACTIONS}
_LINES = 300
"""The number of lines of the workers' output on a page."""
_STOPPED = {"over": "the job had already ended", "cancelled": "the job is cancelled", "told": "stop requested"}
_PATIENCE = 10.0
"""Seconds that a browser has to send its request."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job(parser, "*")
    parser.add_argument(
        "--port",
        type=argument(of_option("--port", port)),
        metavar="PORT",
        default=0,
        help="port to listen on (default: any free one)",
    )


def run(args: argparse.Namespace) -> int:
    site = _Pages(args.job)
    try:
        server = _PageServer(("127.0.0.1", args.port), site)
    except OSError as error:
        raise ElasticError(f"--port {args.port}: {error.strerror}; choose another, or leave --port out") from error
    listens = f"127.0.0.1:{server.server_port}"
    tunnel = f"from your own machine, first: ssh -N -L {server.server_port}:{listens} {socket.gethostname()}"
    print(f"http://{listens}/{site.token}/\n{tunnel}\nCtrl-C ends this", file=sys.stderr, flush=True)
    with server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    return 0


class _Output:
    """The last lines of a job's output."""

    def __init__(self, run_dir: str) -> None:
        self._logs, self._begun = Logs(RunDir(run_dir).path / "logs", Wanted()), False
        self._last: deque[str] = deque(maxlen=_LINES)
        self._lock = threading.Lock()

    def lines(self, *, over: bool) -> Sequence[str]:
        """``over``: the job will write no more."""
        with self._lock:
            added = list(self._logs.added() if self._begun else self._logs.last(_LINES))
            self._begun = True
            added += self._logs.rest() if over else []
            self._last.extend(f"rank {line.rank}{' err' * (line.stream == 'err')}| {line.text}" for line in added)
            return list(self._last)


class _Pages:
    """What the pages show. The threads of several requests call this at the same time."""

    def __init__(self, run_dirs: Sequence[RunDir]) -> None:
        self.token = secrets.token_urlsafe(24)
        self._run_dirs, self._jobs = run_dirs, Jobs([], also_unreadable=True)
        self._looking = threading.Lock()
        self._looks: dict[str, Look] | None = None
        self._looked = float("-inf")
        self._outputs: dict[str, _Output] = {}
        self._said: dict[str, str] = {}
        """What the last action on a job has done, by the job's key."""

    def jobs(self, nonce: str) -> str:
        looks = self._look()
        return jobs_page([(key, look.view) for key, look in looks.items()], self._jobs.problem, nonce)

    def job(self, key: str, nonce: str) -> str | None:
        """The page of one job, None if there is no such job."""
        if (look := self._look().get(key)) is None:
            return None
        lines = self._outputs.setdefault(key, _Output(look.view.run_dir)).lines(over=look.view.over)
        said = self._said.get(key, "")
        return job_page(look.view, look.story, time.time(), key=key, why=why(look), log=lines, said=said, nonce=nonce)

    def act(self, key: str, action: str) -> bool:
        """Do ``action`` with a job, and remember what happened. Returns False if there is no such job."""
        if (look := (self._looks or self._look()).get(key)) is None:
            return False
        job = Job(look.view.run_dir)
        try:
            if action == "drain":
                job.drain()
                done = "drain requested: the workers save first"
            else:
                done = _STOPPED[job.stop(after_checkpoint=action == "save-and-stop")]
        except (ElasticError, OSError) as error:
            done = str(error)
        self._said[key] = f"{time.strftime('%H:%M:%S')}  {done}"
        self._looked = float("-inf")
        return True

    def _look(self) -> dict[str, Look]:
        """The jobs by their keys. While another thread looks at them, for example because Slurm does not answer, the
        result of the previous look.
        """
        if self._looking.acquire(blocking=self._looks is None):
            try:
                self._update()
            finally:
                self._looking.release()
        return self._looks or {}

    def _update(self) -> None:
        if time.monotonic() - self._looked >= _LOOK_INTERVAL:
            looks = looks_of(self._jobs, self._run_dirs, _SLURM_INTERVAL)
            self._looks = {_key(look.view.run_dir): look for look in looks}
            self._looked = time.monotonic()


def _key(run_dir: str) -> str:
    """The name of a job in a URL: two clusters may have jobs with the same id."""
    return hashlib.sha256(run_dir.encode(errors="surrogateescape")).hexdigest()[:16]


class _PageServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], site: _Pages) -> None:
        self.site = site
        super().__init__(address, _PageHandler)

    def handle_error(self, *_: object) -> None:
        """Does nothing: a browser that has disconnected is no error."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError | TimeoutError):
            entry.tell("elastic-hpc", f"a page could not be made: {error!r}")


class _PageHandler(BaseHTTPRequestHandler):
    server: _PageServer
    timeout = _PATIENCE

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, answer: Callable[[], None]) -> None:
        """``answer``; if something cannot be read, the page reports it."""
        try:
            answer()
        except (ConnectionError, TimeoutError):
            raise
        except (ElasticError, OSError) as error:
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, explain=str(error))
        except Exception as error:
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, explain=repr(error))
            raise

    def _get(self) -> None:
        nonce = secrets.token_urlsafe(12)
        match self._path():
            case []:  # the URL lost its last / when the user copied it
                self.send_response(HTTPStatus.SEE_OTHER)
                self.send_header("Location", f"/{self.server.site.token}/")
                self.end_headers()
            case [""]:
                self._send(self.server.site.jobs(nonce), nonce)
            case ["job", key] if page := self.server.site.job(key, nonce):
                self._send(page, nonce)
            case _:
                self._unknown()

    def _post(self) -> None:
        match self._path():
            case ["job", key, action] if action in _ACTIONS and self.server.site.act(key, action):
                self.send_response(HTTPStatus.SEE_OTHER)
                self.send_header("Location", f"../{key}")
                self.end_headers()
            case _:
                self._unknown()

    def _path(self) -> list[str] | None:
        """The parts of the path after the token; None without the token."""
        _, token, *rest = [*self.path.partition("?")[0].split("/"), ""]
        return rest[:-1] if hmac.compare_digest(token.encode(), self.server.site.token.encode()) else None

    def _send(self, page: str, nonce: str) -> None:
        body = page.encode(errors="replace")
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header(
            "Content-Security-Policy",
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; img-src data:; "
            "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
        )
        self.end_headers()
        self.wfile.write(body)

    def _unknown(self) -> None:
        """The same answer for a wrong token and for an unknown job."""
        self.send_error(HTTPStatus.NOT_FOUND)

    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing: the path of a request contains the token."""
