"""A real Slurm of several nodes on one Debian or Ubuntu machine, for tests.

  sudo bin/mini-slurm up                      nodes n1..n4, idle when the command returns
  sudo bin/mini-slurm exec -- srun -N4 hostname
  sudo bin/mini-slurm kill n3                 power loss: nothing leaves n3 any more, not even a TCP reset
  sudo bin/mini-slurm heal n3
  sudo bin/mini-slurm down                    leaves nothing behind but the installed packages

How it is built: one process, the rack, is init of a PID namespace and owns a network namespace with two bridges.
Each machine (login, n1, n2, ...) is an init below the rack with PID, mount, UTS, IPC and network namespaces of
its own. When an init dies its whole machine dies, and when the rack dies everything does. /etc is a private copy
inside the machines, so names, the unprivileged user and Slurm's configuration exist only there.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import grp
import json
import os
import pwd
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

USER, DOMAIN = "minislurm", "mini.cluster"
NETWORKS = {"eth0": 213, "ib0": 214}  # interface, which is also the name of its bridge: second byte of 10.x.0.0/24
DEADLINE_S = 90.0
PACKAGES = {"slurmctld": "slurmctld", "slurmd": "slurmd", "srun": "slurm-client", "munged": "munge", "ip": "iproute2"}
POLICY = Path("/usr/sbin/policy-rc.d")  # Debian's way to say that an installation must not start services
POLICY_TEXT = "#!/bin/sh\n# Written by mini-slurm during an installation.\nexit 101\n"
CLEAN_ENV = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWNET = 1 << 17, 1 << 26, 1 << 27, 1 << 29, 1 << 30
MS_SAFE, MS_BIND, MS_REC, MS_PRIVATE = 2 | 4, 1 << 12, 1 << 14, 1 << 18  # SAFE: nosuid, nodev
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15
LIBC = ctypes.CDLL(None, use_errno=True)

SLURM_CONF = """\
ClusterName=mini
SlurmctldHost=login
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={state}/run/munge.socket
StateSaveLocation={state}/spool/slurmctld
SlurmdSpoolDir={state}/spool/%n
SlurmctldPidFile={state}/run/slurmctld-login.pid
SlurmdPidFile={state}/run/slurmd-%n.pid
SlurmctldLogFile={state}/log/slurmctld.log
SlurmdLogFile={state}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# Slurm believes this file, not the hardware: the nodes together may have more CPUs than the machine.
SlurmdParameters=config_overrides
# Only the scheduler's own waits are short. KillWait and the lifetime of credentials keep Slurm's defaults, because
# what an elastic job experiences (the delay of a requeue above all) depends on them.
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SlurmdTimeout=10
ReturnToService=2
JobRequeue=1
GresTypes=gpu
NodeName=n[1-{nodes}] CPUs={cpus} Sockets=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=2000{gres} State=UNKNOWN
PartitionName=main Nodes=n[1-{nodes}] Default=YES MaxTime=UNLIMITED PreemptMode=OFF State=UP
PartitionName=short Nodes=n[1-{nodes}] MaxTime=2 PreemptMode=OFF State=UP
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=low Nodes=n[1-{nodes}] PriorityTier=1 PreemptMode=REQUEUE GraceTime=10 State=UP
PartitionName=lowcancel Nodes=n[1-{nodes}] PriorityTier=1 PreemptMode=CANCEL GraceTime=10 State=UP
PartitionName=high Nodes=n[1-{nodes}] PriorityTier=10 PreemptMode=OFF State=UP
"""


class MiniSlurmError(Exception):
    """One line: what was found, what was expected, what to type."""


@dataclass(frozen=True)
class Shape:
    nodes: int
    cpus_per_node: int
    gpus_per_node: int
    shares: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        return [f"n{k}" for k in range(1, self.nodes + 1)]


def say(text: str) -> None:
    print(f"mini-slurm: {text}", file=sys.stderr, flush=True)


def libc(function: str, *args: object) -> None:
    if getattr(LIBC, function)(*args) != 0:
        raise OSError(ctypes.get_errno(), f"{function}{args}: {os.strerror(ctypes.get_errno())}")


def mount(source: str | Path, target: str | Path, kind: str = "none", flags: int = 0, data: str = "") -> None:
    libc("mount", *map(os.fsencode, (source, target, kind)), ctypes.c_ulong(flags), os.fsencode(data))


def run(
    *argv: str, check: bool = True, stdin: str = "", env: dict[str, str] = CLEAN_ENV, pass_fds: Sequence[int] = ()
) -> str:
    done = subprocess.run(argv, input=stdin, env=env, text=True, capture_output=True, check=False, pass_fds=pass_fds)
    if check and done.returncode != 0:
        tail = (done.stderr or done.stdout).strip()[-2000:]
        raise MiniSlurmError(f"{' '.join(argv)} failed with exit code {done.returncode}: {tail}")
    return done.stdout


def record_of(process: str | int) -> str:
    """Names one process for good: pid, start in ticks since boot, boot."""
    start = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{process} {start} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"


class Cluster:
    """The state directory and every question that it answers."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.marker = state / "state.json"  # first file in, last one out: it says that the directory is ours
        self.conf = state / "etc/slurm/slurm.conf"
        self.home = state / "home"
        self.lock_fd = -1  # commands that outlive a crash of `up` inherit it, so that `down` waits for their end

    def saved(self) -> tuple[Shape, int] | None:
        """Shape and uid of the user; None when `up` never got to its end."""
        try:
            saved = json.loads(self.marker.read_text())
            return Shape(**{**saved["shape"], "shares": tuple(saved["shape"]["shares"])}), saved["uid"]
        except (FileNotFoundError, ValueError):
            return None

    def is_up(self) -> bool:
        return self.saved() is not None and self.init_of("rack") is not None and self.init_of("login") is not None

    def require_up(self) -> tuple[Shape, int]:
        saved = self.saved()
        if saved is None or not self.is_up():
            raise MiniSlurmError(f"no cluster is up in {self.state}: type  mini-slurm up")
        return saved

    def require_node(self, name: str, *, powered: bool = True) -> Shape:
        shape, _ = self.require_up()
        if name not in shape.names:
            raise MiniSlurmError(f"no node {name!r}: expected one of {' '.join(shape.names)}")
        if powered and self.init_of(name) is None:
            raise MiniSlurmError(f"{name} has no power: type  mini-slurm heal {name}")
        return shape

    def init_of(self, machine: str) -> int | None:
        """Host pid of the machine's init, None when the machine has no power."""
        try:
            record = (self.state / "machines" / machine).read_text()
            pid = int(record.split()[0])
            contained = os.readlink(f"/proc/{pid}/ns/pid") != os.readlink("/proc/self/ns/pid")
            return pid if contained and record_of(pid) == record else None
        except (OSError, IndexError, ValueError):
            return None

    def power_off(self, machine: str) -> None:
        if (init := self.init_of(machine)) is None:
            return
        with contextlib.suppress(ProcessLookupError), os.fdopen(os.pidfd_open(init)) as handle:
            if self.init_of(machine) == init:  # else the pid was reused before the handle was ours
                signal.pidfd_send_signal(handle.fileno(), signal.SIGKILL)
                if not select.select([handle], [], [], 30.0)[0]:
                    raise MiniSlurmError(f"{machine}: its init {init} is still there 30 s after SIGKILL")

    def ip(self, machine: str, *lines: str) -> None:
        net = f"--net=/proc/{self.init_of(machine)}/ns/net"
        run("nsenter", net, "ip", "-batch", "-", stdin="\n".join(lines) + "\n")

    def ports(self) -> dict[str, bool]:
        """Whether each port of the rack's bridges (NODE-INTERFACE) is up."""
        net = f"--net=/proc/{self.init_of('rack')}/ns/net"
        return {link["ifname"]: "UP" in link["flags"] for link in json.loads(run("nsenter", net, "ip", "-j", "link"))}

    def inside(self, machine: str, *argv: str, check: bool = True) -> str:
        """Run a command as root in all namespaces of a machine."""
        if (init := self.init_of(machine)) is None:
            raise MiniSlurmError(f"machine {machine} is dead; the logs say:\n{self.log_tail()}")
        return run("nsenter", f"--target={init}", "-m", "-u", "-i", "-n", "-p", "--wd=/", "--", *argv, check=check)

    def slurm(self, *argv: str, check: bool = True) -> str:
        return self.inside("login", "env", "SLURM_TIME_FORMAT=%s", f"SLURM_CONF={self.conf}", *argv, check=check)

    def slurm_nodes(self) -> dict[str, tuple[str, int]]:
        """State in Slurm's words and start of slurmd (epoch seconds, 0 before it registers), by node.

        Not from sinfo: in 22.05 that goes on showing a node that ran a job as mixed* after Slurm has set it DOWN.
        """
        text = self.slurm("scontrol", "--oneliner", "show", "nodes", check=False)
        facts = [dict(re.findall(r"(\w+)=(\S+)", line)) for line in text.splitlines()]
        starts = [int(each["SlurmdStartTime"]) if each.get("SlurmdStartTime", "").isdecimal() else 0 for each in facts]
        return {each["NodeName"]: (each["State"], start) for each, start in zip(facts, starts, strict=True) if each}

    def daemon_runs(self, machine: str, daemon: str) -> bool:
        try:
            pid = int((self.state / "run" / f"{daemon}-{machine}.pid").read_text())
            return Path(f"/proc/{self.init_of(machine)}/root/proc/{pid}/comm").read_text().strip() == daemon
        except (OSError, ValueError):
            return False

    def log_tail(self) -> str:
        texts = {path.name: path.read_text(errors="replace").splitlines() for path in self.state.glob("log/*.log")}
        telling = {name: [line for line in text if re.search("error|fatal", line)] for name, text in texts.items()}
        return "\n".join(f"  {name}: {line}" for name in sorted(texts) for line in (telling[name] or texts[name])[-6:])

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One up, heal or down at a time. The parent directory is the lock file: nothing to remove afterwards."""
        try:
            handle = os.open(self.state.parent, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            raise MiniSlurmError(f"--state {self.state}: type  mkdir -p {self.state.parent}  first") from None
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("waiting for another mini-slurm to finish")
                fcntl.flock(handle, fcntl.LOCK_EX)
            self.lock_fd = handle
            yield
        finally:
            os.close(handle)


# --- machines ---------------------------------------------------------------------------------------------------------


def boot(cluster: Cluster, machine: str, flags: int, setup: Callable[[], None]) -> None:
    """Start an init in new namespaces, below the rack once there is one; return when it has run `setup`."""
    rack = cluster.init_of("rack")
    readable, writable = os.pipe()
    if (child := os.fork()) == 0:
        try:
            if rack is not None:
                libc("setns", os.open(f"/proc/{rack}/ns/pid", os.O_RDONLY), CLONE_NEWPID)
                if os.fork():
                    os._exit(0)
            os.setsid()
            libc("unshare", flags | CLONE_NEWPID)
            if os.fork():
                os._exit(0)
            # /proc is still the outer one here, so it knows this process by its outer pid.
            record = cluster.state / "machines" / machine
            record.write_text(record_of(os.readlink("/proc/self")))
            os.chdir("/")
            for standard in (0, 1, 2):
                os.dup2(os.open(os.devnull, os.O_RDWR), standard)
            writable = os.dup2(writable, 3)
            os.closerange(4, 65536)
            libc("prctl", PR_SET_NAME, f"mini-{machine}".encode(), 0, 0, 0)
            setup()
            os.write(writable, b"ready")
            os.close(writable)
            be_init(record)
        except BaseException as error:  # noqa: BLE001 - a forked child never returns into the caller's code
            os.write(writable, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(1)
    os.close(writable)
    os.waitpid(child, 0)
    with open(readable, encoding="utf-8") as file:
        if (answer := file.read()) != "ready":
            raise MiniSlurmError(f"machine {machine} did not start: {answer or 'its init died'}")


def be_init(record: Path) -> None:
    """Reap orphans until killed, or until somebody removed the state directory by hand."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    while record.exists():
        signal.sigtimedwait({signal.SIGCHLD}, 2.0)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def furnish(cluster: Cluster, shape: Shape, machine: str) -> None:
    """What the init of a machine does in its new namespaces before anybody else enters them."""
    socket.sethostname(machine)
    mount("none", "/", flags=MS_REC | MS_PRIVATE)
    mount("proc", "/proc", "proc", MS_SAFE)
    cgroup = os.open("/sys/fs/cgroup", os.O_PATH)
    mount("sysfs", "/sys", "sysfs", MS_SAFE)  # a new one shows the interfaces of this machine
    mount(f"/proc/self/fd/{cgroup}", "/sys/fs/cgroup", flags=MS_BIND | MS_REC)
    mount("tmpfs", "/dev/shm", "tmpfs", MS_SAFE, "mode=1777")  # noqa: S108 - a mount point
    mount(cluster.state / "etc", "/etc", flags=MS_BIND)
    # Let everybody reach the shares: where a directory above one is closed, an open and empty one takes its place.
    closed = {
        share: next((above for above in reversed(Path(share).parents) if not above.stat().st_mode & 0o001), None)
        for share in sorted({str(cluster.state), *shape.shares})
    }
    handles = {share: os.open(share, os.O_PATH) for share, above in closed.items() if above is not None}
    for above in sorted({above for above in closed.values() if above is not None}):
        mount("tmpfs", above, "tmpfs", MS_SAFE, "mode=0755")
    for share, handle in handles.items():
        os.makedirs(share, exist_ok=True)
        mount(f"/proc/self/fd/{handle}", share, flags=MS_BIND | MS_REC)


def host_number(machine: str) -> int:
    return 254 if machine == "login" else int(machine[1:])


def start_machine(cluster: Cluster, shape: Shape, machine: str) -> None:
    namespaces = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWNET
    boot(cluster, machine, namespaces, lambda: furnish(cluster, shape, machine))
    k, present = host_number(machine), cluster.ports()
    for interface, byte in NETWORKS.items():
        port = f"{machine}-{interface}"
        cluster.ip(
            "rack",
            *([f"link del {port}"] if port in present else []),  # of its previous life
            f"link add {port} type veth peer name {interface} netns {cluster.init_of(machine)}",
            f"link set {port} master {interface} up",
        )
        cluster.ip(
            machine,
            f"address add 10.{byte}.0.{k}/24 dev {interface}",
            f"link set {interface} address 02:00:00:00:{byte:02x}:{k:02x} up",  # the same after a heal
        )
    cluster.ip(machine, "link set lo up")


def wait_usable(cluster: Cluster, nodes: Sequence[str], since_epoch_s: float = 0.0) -> None:
    """Wait until jobs can run on all `nodes`, with slurmd's that registered after `since_epoch_s`.

    A node that comes back may drain itself only then: it could not report that a task had ended.
    """
    deadline, shown = time.monotonic() + DEADLINE_S, ""
    while True:
        known = cluster.slurm_nodes()
        states = {node: known.get(node, ("unknown", 0)) for node in nodes}
        if all(s in ("IDLE", "MIXED", "ALLOCATED") and t >= int(since_epoch_s) for s, t in states.values()):
            return
        now = " ".join(f"{node}={s if t >= int(since_epoch_s) else 'unregistered'}" for node, (s, t) in states.items())
        if now != shown:
            say(f"waiting for the nodes: {now}")
            shown = now
        for node, (state, _) in states.items():
            if "DRAIN" in state:
                cluster.slurm("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
        if time.monotonic() > deadline:
            raise MiniSlurmError(f"after {DEADLINE_S:.0f} s: {now}; the logs say:\n{cluster.log_tail()}")
        time.sleep(0.1)


# --- up and down ------------------------------------------------------------------------------------------------------


def up(cluster: Cluster, args: argparse.Namespace) -> int:
    started = time.time()
    shape = Shape(args.nodes, args.cpus_per_node, args.gpus_per_node, requested_shares(args.share))
    with cluster.lock():
        if cluster.is_up() and (saved := cluster.saved()) is not None:
            if saved[0] != shape:
                raise MiniSlurmError(f"a cluster of another shape is up, {saved[0]}: type  mini-slurm down  first")
            say(f"already up with {shape.nodes} nodes")
            return 0
        tear_down(cluster)
        if len(os.fsencode(cluster.state)) > 80:
            raise MiniSlurmError(f"--state {cluster.state}: expected at most 80 bytes, there are sockets in it")
        try:
            bring_up(cluster, shape)
        except BaseException:
            tear_down(cluster)
            raise
    say(f"up: {shape.nodes} nodes idle after {time.time() - started:.1f} s; try  mini-slurm exec -- sinfo")
    return 0


def requested_shares(paths: list[str] | None) -> tuple[str, ...]:
    shares = {os.path.realpath(path) for path in paths or [os.path.join(os.path.realpath(__file__), "../../..")]}
    for path in sorted(shares):
        if not os.path.isdir(path):
            raise MiniSlurmError(f"--share {path}: no such directory")
        if os.stat(path).st_mode & 0o005 != 0o005:
            if paths:
                raise MiniSlurmError(f"--share {path}: {USER} may not enter it: type  chmod o+rx {path}")
            say(f"{path} is not shared, {USER} may not enter it: type  chmod o+rx {path}  if jobs need it")
            shares.remove(path)
    return tuple(sorted(shares))


def bring_up(cluster: Cluster, shape: Shape) -> None:
    state, started = cluster.state, time.time()
    state.mkdir(mode=0o755)
    cluster.marker.touch()
    install_packages(cluster)
    taken = {entry.pw_uid for entry in pwd.getpwall()} | {entry.gr_gid for entry in grp.getgrall()}
    uid = next(k for k in range(59000 + zlib.crc32(os.fsencode(state)) % 900, 60000) if k not in taken)
    write_files(cluster, shape, uid)
    boot(cluster, "rack", CLONE_NEWNET, lambda: None)
    cluster.ip("rack", *(f"link add {bridge} up type bridge" for bridge in NETWORKS))
    start_machine(cluster, shape, "login")
    munge = {"key-file": "munge.key", "socket": "run/munge.socket", "pid-file": "run/munged-login.pid"}
    munge |= {"log-file": "log/munged.log", "seed-file": "run/munge.seed"}
    cluster.inside("login", "munged", "--force", *(f"--{option}={state / path}" for option, path in munge.items()))
    cluster.inside("login", "slurmctld", "-f", str(cluster.conf))
    for node in shape.names:
        start_machine(cluster, shape, node)
        cluster.inside(node, "slurmd", "-N", node, "-f", str(cluster.conf))
    wait_usable(cluster, shape.names, started)
    (state / "state.new").write_text(json.dumps({"shape": asdict(shape), "uid": uid}))
    (state / "state.new").replace(cluster.marker)


def install_packages(cluster: Cluster) -> None:
    missing = sorted({pack for name, pack in PACKAGES.items() if shutil.which(name, path=CLEAN_ENV["PATH"]) is None})
    if not missing:
        return
    say(f"installing {' '.join(missing)}")
    if shutil.which("apt-get") is None:
        raise MiniSlurmError(f"no apt-get on this machine: install {' '.join(missing)} by other means first")
    apt = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    if not POLICY.exists():
        POLICY.write_text(POLICY_TEXT)
        POLICY.chmod(0o755)
    try:
        keep = [cluster.lock_fd]
        run("apt-get", "-q", "update", env=apt, pass_fds=keep)
        run("apt-get", "-q", "install", "-y", "--no-install-recommends", *missing, env=apt, pass_fds=keep)
        if shutil.which("systemctl") is not None:
            for service in {"slurmctld", "slurmd", "munge"} & set(missing):
                run("systemctl", "disable", service, check=False)
    finally:
        remove_policy()


def remove_policy() -> None:
    if POLICY.exists() and POLICY.read_text() == POLICY_TEXT:
        POLICY.unlink()


def write_files(cluster: Cluster, shape: Shape, uid: int) -> None:
    state, etc = cluster.state, cluster.state / "etc"
    for name in ("machines", "log", "run", "gpus", "home", "spool", "spool/slurmctld"):
        (state / name).mkdir()
    for node in shape.names:
        (state / "spool" / node).mkdir()
    os.chown(cluster.home, uid, uid)
    with open(os.open(state / "munge.key", os.O_WRONLY | os.O_CREAT, 0o400), "wb") as file:
        file.write(os.urandom(128))
    run("cp", "--archive", "/etc", str(etc), pass_fds=[cluster.lock_fd])
    shutil.rmtree(etc / "slurm", ignore_errors=True)
    (etc / "slurm").mkdir()
    hosts = ["127.0.0.1 localhost", "::1 localhost ip6-localhost ip6-loopback"]
    for machine in ("login", *shape.names):
        for interface, byte in NETWORKS.items():
            name = machine if interface == "eth0" else f"{machine}-{interface}"
            # Programs with IPv6 sockets ask for the name of the mapped address.
            address = f"10.{byte}.0.{host_number(machine)}"
            hosts += [f"{form}{address} {name} {name}.{DOMAIN}" for form in ("", "::ffff:")]
    gpus = shape.gpus_per_node
    for k in range(gpus):  # nobody opens them, but slurmd insists on devices: these are /dev/null's
        os.mknod(state / f"gpus/gpu{k}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    gres = {"nodes": shape.nodes, "cpus": shape.cpus_per_node, "gres": f" Gres=gpu:{gpus}" if gpus else ""}
    for name, text in {
        "hosts": "\n".join(hosts) + "\n",
        "resolv.conf": "",
        "nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files\n",
        "passwd": f"{Path('/etc/passwd').read_text()}{USER}:x:{uid}:{uid}::{cluster.home}:/bin/bash\n",
        "group": f"{Path('/etc/group').read_text()}{USER}:x:{uid}:\n",
        "slurm/slurm.conf": SLURM_CONF.format(state=state, **gres),
        "slurm/gres.conf": f"AutoDetect=off\nName=gpu File={state}/gpus/gpu[0-{gpus - 1}]\n" if gpus else "",
    }.items():
        (etc / name).unlink(missing_ok=True)  # it may be a link to the machine's own
        (etc / name).write_text(text)


def down(cluster: Cluster, _: argparse.Namespace) -> int:
    with cluster.lock():
        say(f"removed {cluster.state}" if tear_down(cluster) else "nothing to remove")
    return 0


def tear_down(cluster: Cluster) -> bool:
    """Remove whatever `up` made, however far it got; False when there was nothing."""
    if not cluster.state.exists():
        return False
    if not cluster.marker.exists() and any(cluster.state.iterdir()):
        raise MiniSlurmError(f"{cluster.state} is not mini-slurm's: name another directory with --state")
    cluster.power_off("rack")
    remove_policy()
    for entry in set(cluster.state.iterdir()) - {cluster.marker}:
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    cluster.marker.unlink(missing_ok=True)
    cluster.state.rmdir()
    return True


# --- faults, status, exec ---------------------------------------------------------------------------------------------


def links_down(cluster: Cluster, args: argparse.Namespace) -> int:
    """`cut`, and the first half of `kill`."""
    cluster.require_node(args.node)
    cluster.ip("rack", *(f"link set {args.node}-{interface} down" for interface in NETWORKS))
    moment = time.time()
    if args.command_name == "kill":
        cluster.power_off(args.node)
    print(f"{moment:.6f} {args.node} {args.command_name}", flush=True)
    return 0


def heal(cluster: Cluster, args: argparse.Namespace) -> int:
    node, started = args.node, 0.0
    shape = cluster.require_node(node, powered=False)
    with cluster.lock():
        if cluster.init_of(node) is None:
            # Slurm gives up a node's jobs when the node's uptime says that it rebooted. Ours have one uptime: say it.
            cluster.slurm("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost power")
            start_machine(cluster, shape, node)
        cluster.ip("rack", *(f"link set {node}-{interface} up" for interface in NETWORKS))
        if not cluster.daemon_runs(node, "slurmd"):
            started = time.time()
            cluster.inside(node, "slurmd", "-N", node, "-f", str(cluster.conf))
        state, _ = cluster.slurm_nodes().get(node, ("", 0))
        if re.search("DOWN|FAIL", state):
            cluster.slurm("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
        wait_usable(cluster, [node], started)
    print(f"{time.time():.6f} {node} heal", flush=True)
    return 0


def status(cluster: Cluster, args: argparse.Namespace) -> int:
    saved = cluster.saved() if cluster.is_up() else None
    report: dict[str, object] = {"up": saved is not None, "state": str(cluster.state)}
    if saved is not None:
        known, ports = cluster.slurm_nodes(), cluster.ports()
        daemons = {name: cluster.daemon_runs("login", name) for name in ("munged", "slurmctld")}
        nodes = {
            node: {
                "slurm": known.get(node, ("unknown", 0))[0],
                "power": cluster.init_of(node) is not None,
                "links": all(ports.get(f"{node}-{interface}", False) for interface in NETWORKS),
                "slurmd": cluster.daemon_runs(node, "slurmd"),
                "init_pid": cluster.init_of(node),
            }
            for node in saved[0].names
        }
        jobs = cluster.slurm("squeue", "-h", "-o", "%i %T %j %N", check=False).splitlines()
        report |= {"user": USER, "uid": saved[1], "home": str(cluster.home), "slurm_conf": str(cluster.conf)}
        report |= {"shape": asdict(saved[0]), "daemons": daemons, "nodes": nodes, "jobs": jobs}
    if args.json:
        print(json.dumps(report, indent=1))
    elif saved is None:
        print(f"not up: {cluster.state}" + (" has leftovers: mini-slurm down" if cluster.state.exists() else ""))
    else:
        print(f"up: {cluster.state}, user {USER}, home {cluster.home}")
        print("login:", ", ".join(f"{name} {'runs' if runs else 'DEAD'}" for name, runs in daemons.items()))
        for node, facts in nodes.items():
            words = [f"{what} {'yes' if facts[what] else 'NO'}" for what in ("power", "links", "slurmd")]
            print(f"{node}: {facts['slurm']}, {', '.join(words)}, init {facts['init_pid']}")
        print("\n".join(f"job {line}" for line in jobs) or "no jobs")
    return 0 if saved is not None else 3


def execute(cluster: Cluster, args: argparse.Namespace) -> int:
    """A transparent parent of the command: the same stdio and process group, signals and exit status passed on."""
    _, uid = cluster.require_up()
    if args.node != "login":
        cluster.require_node(args.node)
    uid, user, home = (0, "root", "/root") if args.root else (uid, USER, str(cluster.home))
    env = {**CLEAN_ENV, "TERM": os.environ.get("TERM", "dumb"), "SHELL": "/bin/bash", "SLURM_CONF": str(cluster.conf)}
    env |= {"HOME": home, "USER": user, "LOGNAME": user}
    for item in args.env:
        name, equals, value = item.partition("=")
        if not name or not (equals or name in os.environ):
            raise MiniSlurmError(f"--env {item!r}: expected NAME=VALUE, or the NAME of a variable that is set")
        env[name] = value if equals else os.environ[name]
    argv = args.command[1:] if args.command[:1] == ["--"] else args.command
    argv = argv or ["/bin/bash", "-l"]
    here, init = os.getcwd(), cluster.init_of(args.node)
    namespaces = [os.open(f"/proc/{init}/ns/{kind}", os.O_RDONLY) for kind in ("pid", "ipc", "uts", "net", "mnt")]
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
            for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, commands expect the default
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
    """Pass on the signals that processes send to us, end as the child ends."""
    while True:
        info = signal.sigwaitinfo(signal.valid_signals())
        if info.si_signo != signal.SIGCHLD:
            if info.si_code <= 0:  # from kill(2); what comes from the terminal the child gets as well
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


# --- command line -----------------------------------------------------------------------------------------------------

COMMANDS: dict[str, Callable[[Cluster, argparse.Namespace], int]] = {
    "up": up,
    "down": down,
    "status": status,
    "kill": links_down,
    "cut": links_down,
    "heal": heal,
    "exec": execute,
}
HELP = """\
up: start the cluster; returns when all nodes are idle. Installs Slurm's packages where they are missing (apt-get).
  mini-slurm up
  mini-slurm up --nodes 2 --cpus-per-node 4 --gpus-per-node 0
  mini-slurm up --share /root/project
down: end and remove everything; harmless when there is nothing.
  mini-slurm down
status: show nodes, daemons and jobs; exit code 0 when up, 3 when not.
  mini-slurm status --json
kill: power loss of a node; links down first, then SIGKILL to all of it. Prints when the links went down (epoch).
  mini-slurm kill n3
cut: network partition; the node runs on without links. Prints when the links went down (epoch).
  mini-slurm cut n3
heal: undo kill or cut; returns when Slurm can use the node again.
  mini-slurm heal n3
exec: run a command as the user minislurm on the login machine; without a command, a shell. Stdio, signals and exit
code are the command's (125: mini-slurm's own errors). It starts in the current directory if the user may, else at
home, with a clean environment.
  mini-slurm exec -- sbatch -N4 --wrap 'srun hostname'
  mini-slurm exec --node n2 --env OMP_NUM_THREADS=1 -- env
  mini-slurm exec --root -- scontrol update NodeName=n2 State=DRAIN Reason=test
  mini-slurm exec
"""


def number_in(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a number from {least} to {most}")
        return int(text)

    return parse


def parse_arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser("mini-slurm", description=__doc__, formatter_class=raw, allow_abbrev=False)
    default = os.environ.get("MINI_SLURM_STATE", "/var/lib/mini-slurm")
    text = "the cluster's directory, several can be side by side (default: $MINI_SLURM_STATE or /var/lib/mini-slurm)"
    top.add_argument("--state", type=Path, default=default, metavar="DIR", help=text)
    subparsers = top.add_subparsers(required=True, metavar="COMMAND", dest="command_name")
    of = {}
    for name, text, examples in re.findall(r"^(\w+): ((?:.+\n)+?)((?:  .+\n)+)", HELP, re.MULTILINE):
        epilog = f"examples:\n{examples}"
        summary = re.split("[.;]", text)[0]
        kwargs = {"description": text, "epilog": epilog, "formatter_class": raw, "allow_abbrev": False}
        of[name] = subparsers.add_parser(name, help=summary, **kwargs)
    for name in ("kill", "cut", "heal"):
        of[name].add_argument("node", metavar="NODE", help="n1, n2, ...")
    add = of["up"].add_argument
    add("--nodes", type=number_in(1, 64), default=4, metavar="N", help="default: 4")
    add("--cpus-per-node", type=number_in(1, 256), default=2, metavar="K", help="default: 2")
    add("--gpus-per-node", type=number_in(0, 64), default=2, metavar="G", help="fake ones (default: 2)")
    text = "a directory that jobs must reach although one above it is closed (repeatable; default: this checkout)"
    add("--share", action="append", metavar="PATH", help=text)
    of["status"].add_argument("--json", action="store_true", help="for programs; has the host pids of the nodes' inits")
    add = of["exec"].add_argument
    add("--node", default="login", metavar="NODE", help="n1, n2, ... (default: login)")
    add("--root", action="store_true", help="as root, who is a Slurm operator")
    text = "set a variable, or pass NAME on (repeatable)"
    add("--env", action="append", default=[], metavar="NAME=VALUE", help=text)
    add("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="-- and the command with its arguments")
    return top.parse_args()


def main() -> int:
    args = parse_arguments()
    if os.geteuid() != 0:
        say(f"needs root: type  sudo {shlex.join(sys.argv)}")
        return 2
    os.umask(0o022)
    try:
        return COMMANDS[args.command_name](Cluster(Path(os.path.realpath(args.state))), args)
    except (MiniSlurmError, OSError) as error:
        say(f"error: {error}")
        return 125 if args.command_name == "exec" else 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
