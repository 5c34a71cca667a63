"""The faults of test_faults.py, and what the job's record must contain for each."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conftest import Cluster, Job, wait_for
from cut_links import Links
from memory import memory_cgroup, memory_cgroup_of

NODES = ("n1", "n2", "n3", "n4")
DISK_SIZE = 1200 << 20  # a sparse file; the preflight would refuse less space
PORTS = range(29400, 29500)
LOST = "lost: no heartbeat for 5 s"
PROVOKED = "killed by SIGKILL"


@dataclass
class Scene:
    """A job of ours on four nodes, held at one moment of the training, and the preparations for the fault."""

    cluster: Cluster
    job: Job
    data: Path
    """Folder of the training script."""
    moment: str
    end: contextlib.ExitStack
    """Undoes the changes to the machines at the end of the test."""
    prepared: Any = None
    asleep: list[int] = field(default_factory=list)

    def agent(self, node: str) -> int:
        (pid,) = self.cluster.agents(node)
        return pid

    def worker(self, node: str) -> int:
        (pid,) = self.cluster.running("matrix.py", node)
        return pid

    def has_workers(self, node: str) -> bool:
        return bool(self.cluster.running("matrix.py", node))

    def touch(self, name: str) -> None:
        (self.data / name).touch()

    def at_node(self, node: str, *command: str) -> None:
        """Run ``command`` as root."""
        self.cluster.mini("exec", "--root", "--node", node, "--", *command)

    def in_background(self, node: str, code: str) -> None:
        """Run Python ``code`` as root, and wait until it is done. Its open files stay open until the test ends."""
        ready = self.data / f"ready.{node}"
        code = (
            f"{code}\nimport os, time\nopen({str(ready)!r}, 'w')\nwhile os.path.exists({str(ready)!r}): time.sleep(0.1)"
        )
        self.at_node(node, "sh", "-c", '"$@" >/dev/null 2>&1 &', "sh", sys.executable, "-c", code)
        wait_for(f"{code} on {node}", ready.exists)
        self.end.callback(ready.unlink)

    def wait_next_round(self) -> None:
        """Wait until a worker of the next round runs."""
        wait_for("the next round", lambda: list(self.data.glob("at.start.2.*")))

    def provoke(self) -> None:
        """Provoke a new round, unless a round is being formed anyway."""
        if self.moment != "forming":
            os.kill(self.worker("n3"), signal.SIGKILL)

    def release(self) -> None:
        """Let the training continue from the moment at which it was held."""
        for path in self.data.glob("hold.*"):
            path.unlink()
        while self.asleep:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.asleep.pop(), signal.SIGCONT)

    def wait_noticed(self, cause: str) -> None:
        """Wait until a round has been formed after ``cause``."""

        def look() -> bool:
            events = self.job.events()
            first = next((number for number, event in enumerate(events) if cause in reason(event)), None)
            return first is not None and any(event["event"] == "round" for event in events[first:])

        wait_for(f"a round because of {cause!r}", look)

    def steps(self) -> list[dict[str, Any]]:
        return self.job.lines(self.data / "steps.jsonl")


def reason(event: dict[str, Any]) -> str:
    """The reason of a restart, or the lost node: a loss while a round is being formed leads
    to no restart of its own.
    """
    match event["event"]:
        case "restart":
            return str(event["reason"])
        case "lost":
            return f"{event['node']} lost: {event['reason']}"
        case "apart":
            return str(event["reason"])
        case _:
            return ""


@dataclass(frozen=True)
class Fault:
    name: str
    strike: Callable[[Scene], None]
    cause: str | None
    """Part of the ``reason`` of an event; None if the fault must not be noticed at all."""
    off: tuple[str, ...] = ()
    """Nodes that have no power after the fault."""
    ends: tuple[str, ...] | None = ("n3",)
    """Nodes whose workers the fault ends; None if no worker of any node can continue."""
    prepare: Callable[[Cluster, Path, contextlib.ExitStack], Any] | None = None
    """Runs before the submission of the job, with the folder of the submission."""
    environ: tuple[str, ...] = ()
    """Variables of the job, as NAME=VALUE."""
    options: tuple[str, ...] = ()
    """Options of the submission."""


# faults of workers and agents


def raise_in_worker(scene: Scene) -> None:
    scene.touch("raise.1.2")


def kill_worker(scene: Scene) -> None:
    os.kill(scene.worker("n3"), signal.SIGKILL)


def stop_worker(scene: Scene) -> None:
    os.kill(scene.worker("n3"), signal.SIGSTOP)


def n3_in_a_cgroup(cluster: Cluster, folder: Path, end: contextlib.ExitStack) -> None:
    """Limit the memory of n3's slurmd and all its children, as on a site that limits the memory of jobs."""
    if cluster.is_site:
        return
    slurmd = next(iter(cluster.processes("slurmd", "n3")))
    home, cgroup = memory_cgroup_of(slurmd), end.enter_context(memory_cgroup())

    def leave() -> None:
        home.procs.write_text(str(slurmd))
        wait_for("the cgroup to be empty", lambda: not cgroup.procs.read_text(), 60)

    end.callback(leave)
    cgroup.procs.write_text(str(slurmd))


def starve_worker(scene: Scene) -> None:
    cgroup = memory_cgroup_of(scene.worker("n3"))
    cgroup.limit(cgroup.used + (128 << 20))
    scene.touch("eat.1.2")


def kill_agent(node: str) -> Callable[[Scene], None]:
    return lambda scene: os.kill(scene.agent(node), signal.SIGKILL)


def freeze_agent(node: str) -> Callable[[Scene], None]:
    def strike(scene: Scene) -> None:
        pid = scene.agent(node)
        os.kill(pid, signal.SIGSTOP)
        scene.release()
        scene.wait_noticed(f"{node} {LOST}")
        os.kill(pid, signal.SIGCONT)

    return strike


# faults of nodes and the network


def power_off(node: str) -> Callable[[Scene], None]:
    return lambda scene: scene.cluster.mini("kill", node) and None


def head_then_next(scene: Scene) -> None:
    scene.cluster.mini("kill", "n1")
    scene.release()
    scene.wait_noticed(f"n1 {LOST}")
    scene.cluster.mini("kill", "n2")


def cut(*nodes: str) -> Callable[[Scene], None]:
    def strike(scene: Scene) -> None:
        for node in nodes:
            scene.cluster.mini("cut", node)
        scene.release()
        scene.wait_noticed(f"{nodes[0]} {LOST}" if len(nodes) == 1 else LOST)
        for node in nodes:
            scene.cluster.mini("heal", node)

    return strike


def cut_the_heads_half(scene: Scene) -> None:
    """No part may continue: n1 and n2 see no other node, n3 and n4 are half of the world without its leader."""
    for node in ("n1", "n2"):
        scene.cluster.mini("cut", node)
    wait_for("all workers to be stopped", lambda: not any(map(scene.has_workers, NODES)))
    for node in ("n1", "n2"):
        scene.cluster.mini("heal", node)


def cut_a_pair(scene: Scene) -> None:
    links = Links(scene.cluster)
    scene.end.callback(links.heal)
    links.cut("n2", "n3")
    links.cut("n3", "n2")


TAKE_PORTS = f"""
import contextlib, socket
taken = []
for port in {PORTS}:
    with contextlib.suppress(OSError):  # the agent has it
        taken.append(socket.create_server(("", port)))
"""


def ports_taken_then_head_lost(scene: Scene) -> None:
    scene.in_background("n2", TAKE_PORTS)
    scene.cluster.mini("kill", "n1")


# faults of shared resources


def slurmctld_away(scene: Scene) -> None:
    """Wait until the training has ended."""
    scene.cluster.slurmctld("stop")
    scene.end.callback(scene.cluster.slurmctld, "start")
    scene.release()
    wait_for("the last step", lambda: scene.steps()[-1:] and scene.steps()[-1]["step"] == 60)
    scene.end.pop_all().close()


def a_disk(cluster: Cluster, folder: Path, end: contextlib.ExitStack) -> Path:
    """Put the run directory on a small file system of its own, which all machines mount."""
    image, target = folder / "disk", folder / "elastic-logs"
    cluster.exec(["mkdir", str(target)])
    with image.open("wb") as file:
        file.truncate(DISK_SIZE)
    owner = os.stat(folder)
    subprocess.run(
        [
            "mke2fs",
            "-q",
            "-t",
            "ext4",
            "-O",
            "^has_journal",
            "-E",
            f"root_owner={owner.st_uid}:{owner.st_gid}",
            "-m",
            "0",
            image,
        ],
        check=True,
    )
    cluster.mini("exec", "--root", "--", "mount", "-o", "loop", str(image), str(target))
    device = subprocess.run(["losetup", "-n", "-O", "NAME", "-j", image], check=True, capture_output=True, text=True)
    for node in NODES:
        cluster.mini("exec", "--root", "--node", node, "--", "mount", device.stdout.strip(), str(target))

    def unmount() -> None:
        for machine in ("login", *NODES):
            cluster.mini("exec", "--root", "--node", machine, "--", "umount", "--lazy", str(target), check=False)

    end.callback(unmount)
    return target


FILL = """\
fallocate -l $(stat -f -c '%a * %S' "${0%/*}" | xargs -I{} sh -c 'echo $(({} - 1048576))') "$0"
cat /dev/zero >>"$0" 2>/dev/null || :
"""


def fill_disk(scene: Scene) -> None:
    full = scene.prepared / "full"
    scene.at_node("n4", "sh", "-c", FILL, str(full))
    scene.provoke()
    scene.release()
    scene.wait_next_round()
    scene.at_node("n4", "rm", str(full))


def write_protect(scene: Scene) -> None:
    """No file can be created or opened for writing; open files stay open."""
    folder = str(scene.data / "elastic-logs")
    for node in NODES:
        scene.at_node(node, "mount", "--bind", folder, folder)
        scene.at_node(node, "mount", "-o", "remount,bind,ro", folder)
    scene.provoke()
    scene.release()
    scene.wait_next_round()
    for node in NODES:
        scene.at_node(node, "umount", folder)


CLOCK = """\
import time
def _shifted(real, unit):
    def now():
        try:
            with open("/dev/shm/clock") as file:
                return real() + int(file.read()) * unit
        except OSError:
            return real()
    return now
time.time, time.time_ns = _shifted(time.time, 1), _shifted(time.time_ns, 10**9)
"""


def a_clock(cluster: Cluster, folder: Path, end: contextlib.ExitStack) -> None:
    """Prepare Python's clock to be shifted on each node, because all nodes share the kernel's clock of this machine."""
    cluster.exec(["mkdir", str(folder / "site")])
    (folder / "site" / "sitecustomize.py").write_text(CLOCK)
    for node in NODES:
        end.callback(cluster.exec, ["rm", "-f", "/dev/shm/clock"], node)


def shift_clocks(scene: Scene) -> None:
    for node, seconds in (("n1", 3600), ("n2", -3600), ("n3", 20)):
        scene.cluster.exec(["sh", "-c", f"echo {seconds} >/dev/shm/clock"], node)
    scene.release()
    wait_for("the verdict", (scene.job.run_dir / "verdict.json").exists)
    assert scene.job.verdict()["time"] > time.time() + 3000


def kill_name_server(scene: Scene) -> None:
    """Remove the nodes' names from /etc/hosts; the name server accepts queries but does not answer."""
    state = scene.cluster.state
    hosts = state / "hosts"
    lines = (state / "etc" / "hosts").read_text().splitlines(keepends=True)
    hosts.write_text("".join(line for line in lines if "localhost" in line or "login" in line))
    texts = {
        "resolv.conf": "nameserver 127.0.0.1\n",
        "nsswitch.conf": "hosts: files dns\npasswd: files\ngroup: files\n",
    }
    for name, text in texts.items():
        (state / name).write_text(text)
    for node in NODES:
        scene.in_background(node, "import socket; s = socket.socket(type=socket.SOCK_DGRAM); s.bind(('127.0.0.1', 53))")
        for name in ("hosts", *texts):
            scene.at_node(node, "mount", "--bind", str(state / name), f"/etc/{name}")
            scene.end.callback(scene.at_node, node, "umount", f"/etc/{name}")
    assert scene.cluster.exec(["timeout", "1", "getent", "hosts", "n2"], "n1", check=False).returncode == 124
    scene.provoke()


OF_WORKERS = (
    Fault("worker_exception", raise_in_worker, "RuntimeError: injected"),
    Fault("worker_SIGKILL", kill_worker, "killed by SIGKILL"),
    Fault("worker_SIGSTOP", stop_worker, "stopped by a signal for 5 s"),
    Fault("worker_out_of_memory", starve_worker, "out of memory", prepare=n3_in_a_cgroup),
)
OF_MORE = (
    Fault("agent_SIGKILL", kill_agent("n3"), "n3 lost"),
    Fault("agent_SIGSTOP", freeze_agent("n3"), f"n3 {LOST}"),
    Fault("head_agent_SIGKILL", kill_agent("n1"), "n1 lost", ends=("n1",)),
    Fault("head_agent_SIGSTOP", freeze_agent("n1"), f"n1 {LOST}", ends=("n1",)),
    Fault("power_loss", power_off("n3"), f"n3 {LOST}", off=("n3",)),
    Fault("head_power_loss", power_off("n1"), f"n1 {LOST}", off=("n1",), ends=("n1",)),
    Fault("head_then_next_head", head_then_next, f"n2 {LOST}", off=("n1", "n2"), ends=("n1", "n2")),
    Fault("partition_of_one", cut("n3"), f"n3 {LOST}"),
    Fault("partition_of_the_head", cut("n1"), f"n1 {LOST}", ends=("n1",)),
    Fault("partition_of_half", cut("n3", "n4"), LOST, ends=("n3", "n4")),
    Fault("partition_of_the_heads_half", cut_the_heads_half, LOST, ends=None),
    Fault("store_port_taken", ports_taken_then_head_lost, f"n1 {LOST}", off=("n1",), ends=("n1",)),
    Fault("slurmctld_restarted", slurmctld_away, None, ends=()),
    Fault("shared_directory_full", fill_disk, PROVOKED, prepare=a_disk),
    Fault("shared_directory_read_only", write_protect, PROVOKED),
    Fault("clock_jump", shift_clocks, None, prepare=a_clock, environ=("PYTHONPATH=site",), ends=()),
    Fault("name_server_silent", kill_name_server, PROVOKED),
    Fault("pair_cut", cut_a_pair, "n2 and n3 do not reach each other", ends=None, options=("--hang-timeout", "20")),
)
