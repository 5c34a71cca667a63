"""Notifies the user, by a command or a web address (``--notify``), that the job has ended, returns to the queue, or
makes no progress. Runs processes, and sends to the network.

A failed notification harms nothing, and is written to the job's output. The option comes from the environment, not from
a command line, which all users of a node can read: the address of a web hook is a secret.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import os
import shlex
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from elastic_hpc.agent.threads import start
from elastic_hpc.environment import NOTIFY
from elastic_hpc.errors import ElasticError
from elastic_hpc.options.values import is_web_address
from elastic_hpc.record.rundir import RunDir

_SECONDS = 10.0
"""Time for one notification: Slurm kills a job some time after its requeue (KillWait, 30 s)."""

_LONGEST = 2500
"""Number of characters at the end of a traceback that are sent: the services refuse long messages."""

_WORDS = {"finished": "has finished", "failed": "has failed", "requeue": "returns to the queue"}


def of_verdict(rundir: RunDir, verdict: Mapping[str, Any]) -> dict[str, str]:
    """The notification that the last run of the job has ended with ``verdict``."""
    outcome, failure = str(verdict["outcome"]), verdict.get("failure") or {}
    trace = str(failure.get("traceback") or "").strip()
    return _message(rundir, outcome, _WORDS.get(outcome, outcome), str(verdict["reason"]), trace[-_LONGEST:])


def of_standstill(rundir: RunDir, reason: str) -> dict[str, str]:
    """The notification that the job runs and makes no progress."""
    return _message(rundir, "no progress", "makes no progress", reason, "")


def _message(rundir: RunDir, event: str, words: str, reason: str, trace: str) -> dict[str, str]:
    script = ""
    with contextlib.suppress(ElasticError):
        script = os.path.basename(str((rundir.read("spec.json") or {}).get("script", "")))
    job = f"job {rundir.path.name}" + (f" ({script})" if script else "")
    text = f"{job} {words}: {reason}" + (f"\n```\n{trace}\n```" if trace else "")
    return {
        "text": text,  # for Slack, Mattermost, Teams, Google Chat
        "content": text[:1900],  # for Discord, which refuses more than 2000 characters
        "job": rundir.path.name,
        "event": event,
        "reason": reason,
        "traceback": trace,
        "run_dir": str(rundir.path),
    }


def send(message: Mapping[str, str], environ: Mapping[str, str]) -> str:
    """Send ``message`` as set in ``environ``, if it is set there. Returns the problem, empty for none; takes 10 seconds
    at most.
    """
    target = environ.get(NOTIFY)
    if not target:
        return ""
    sending = start(_post if is_web_address(target) else _run, target, message, environ)
    try:
        problem = sending.result(_SECONDS + 1)
    except concurrent.futures.TimeoutError:
        problem = f"no answer in {_SECONDS:g} s"
    except Exception as error:  # noqa: BLE001 - whatever the error is, the job continues
        problem = type(error).__name__
    return f"the user could not be notified (--notify): {problem}" if problem else ""


def _post(url: str, message: Mapping[str, str], _environ: Mapping[str, str]) -> str:
    request = urllib.request.Request(  # noqa: S310 - the user's own address, of http or https
        url, json.dumps(message).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS):  # noqa: S310 - as above
            return ""
    except urllib.error.HTTPError as error:
        return f"the web address answered {error.code} {error.reason}"
    except urllib.error.URLError as error:
        return f"the web address cannot be reached from this node: {error.reason}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"the web address does not answer: {type(error).__name__}"


def _run(command: str, message: Mapping[str, str], environ: Mapping[str, str]) -> str:
    """The text goes to the command's stdin, all of ``message`` to environment variables. A problem names the program
    alone: an argument may be a secret.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        return str(error)
    program = os.path.basename(words[0])
    variables = {f"ELASTIC_HPC_NOTICE_{name.upper()}": text for name, text in message.items() if name != "content"}
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=2,
            env={**environ, **variables},
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        return f"{program}: {getattr(error, 'strerror', None) or error}"
    try:
        process.communicate(f"{message['text']}\n".encode(), timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"{program}: no end in {_SECONDS:g} s"
    except OSError as error:
        return f"{program}: {error.strerror}"
    return f"{program}: exit code {process.returncode}" if process.returncode else ""
