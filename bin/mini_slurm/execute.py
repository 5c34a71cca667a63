"""The subcommand `exec`: a transparent parent of a command inside a machine."""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import signal

from mini_slurm.cluster import USER, Cluster
from mini_slurm.system import PR_SET_PDEATHSIG, MiniSlurmError, libc, say


def execute(cluster: Cluster, args: argparse.Namespace) -> int:
    """A transparent parent of the command: the same stdio and process group, signals and exit status passed on."""
    _, uid = cluster.require_up()
    if args.node != "login":
        cluster.require_node(args.node)
    uid, user, home = (0, "root", "/root") if args.root else (uid, USER, str(cluster.home))
    env = {**cluster.environment, "TERM": os.environ.get("TERM", "dumb"), "SLURM_CONF": str(cluster.conf)}
    env |= {"SHELL": "/bin/bash", "HOME": home, "USER": user, "LOGNAME": user}
    for item in args.env:
        name, equals, value = item.partition("=")
        if not name or not (equals or name in os.environ):
            raise MiniSlurmError(f"--env {item!r}: expected NAME=VALUE, or the NAME of a variable that is set")
        env[name] = value if equals else os.environ[name]
    argv = args.command[1:] if args.command[:1] == ["--"] else args.command
    argv = argv or ["/bin/bash", "-l"]
    here, init = os.getcwd(), cluster.init_of(args.node)
    namespaces = [
        os.open(f"/proc/{init}/ns/{kind}", os.O_RDONLY) for kind in ("cgroup", "pid", "ipc", "uts", "net", "mnt")
    ]
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    for namespace in namespaces:
        libc("setns", namespace, 0)
    if (child := os.fork()) == 0:
        try:
            os.setgroups([uid])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            libc("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            try:
                os.chdir(here)
            except OSError:
                os.chdir(home)
            for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores these signals, commands expect the default
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
            os.execvpe(argv[0], argv, env)  # noqa: S606 - there is no shell to want
        except OSError as error:
            say(f"exec {argv[0]}: {error.strerror}")
            os._exit(127 if isinstance(error, FileNotFoundError) else 126)
        finally:
            os._exit(125)
    return follow(child)


def follow(child: int) -> int:
    """Forward the signals that processes send to us, and end as the child ends."""
    while True:
        info = signal.sigwaitinfo(signal.valid_signals())
        if info.si_signo != signal.SIGCHLD:
            if info.si_code <= 0:  # from kill(2); a signal from the terminal reaches the child anyway
                os.kill(child, info.si_signo)
            continue
        pid, code = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
        if pid and os.WIFSTOPPED(code):
            if os.WSTOPSIG(code) == signal.SIGTSTP:  # Ctrl-Z: the calling shell must see us stop
                os.kill(os.getpid(), signal.SIGSTOP)
        elif pid and os.WIFEXITED(code):
            return os.WEXITSTATUS(code)
        elif pid:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            with contextlib.suppress(OSError):  # SIGKILL has no handler to reset
                signal.signal(os.WTERMSIG(code), signal.SIG_DFL)
            os.kill(os.getpid(), os.WTERMSIG(code))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
