"""Slurm's configuration, and the copy of /etc that the machines see."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from mini_slurm import site
from mini_slurm.cluster import USER, Cluster, Shape
from mini_slurm.machines import NETWORKS, address
from mini_slurm.system import run

DOMAIN = "mini.cluster"

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
# A ping to a dead node takes 12 s, and the answers of the other nodes of that ping count only after it: with 10 s Slurm
# believes these dead too.
SlurmdTimeout=20
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

# How srun --container runs an OCI bundle: as the job's user, by runc, if that is installed.
OCI_CONF = """\
RunTimeQuery="runc --root=/dev/shm/runc.%u state %j.%s.%t"
RunTimeKill="runc --root=/dev/shm/runc.%u kill --all %j.%s.%t"
RunTimeDelete="runc --root=/dev/shm/runc.%u delete --force %j.%s.%t"
RunTimeRun="runc --root=/dev/shm/runc.%u run --bundle %b %j.%s.%t"
"""


def write_files(cluster: Cluster, shape: Shape, uid: int) -> None:
    """Fill the state directory. ``uid``: of the user, who exists only in the machines' /etc."""
    state, etc = cluster.state, cluster.state / "etc"
    for name in ("machines", "log", "run", "gpus", "home", "spool", "spool/slurmctld"):
        (state / name).mkdir()
    for node in shape.names:
        (state / "spool" / node).mkdir()
    for machine in ("login", *shape.names):
        (state / "munge" / machine).mkdir(parents=True)
    (state / "run/munge").mkdir()  # where each machine sees its own directory
    (state / "run/munge.socket").symlink_to("munge/socket")
    os.chown(cluster.home, uid, uid)
    with open(os.open(state / "munge.key", os.O_WRONLY | os.O_CREAT, 0o400), "wb") as file:
        file.write(os.urandom(128))
    for k in range(shape.gpus_per_node):  # slurmd requires devices; these have numbers for local use and no driver
        os.mknod(state / f"gpus/gpu{k}", 0o666 | stat.S_IFCHR, os.makedev(240, k))
    run("cp", "--archive", "/etc", str(etc), pass_fds=[cluster.lock_fd])
    shutil.rmtree(etc / "slurm", ignore_errors=True)
    (etc / "slurm").mkdir()
    for name, text in {
        "hosts": hosts(shape),
        "resolv.conf": "",
        "nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files\n",
        "passwd": f"{Path('/etc/passwd').read_text()}{USER}:*:{uid}:{uid}::{cluster.home}:/bin/bash\n",
        # Not "x", which promises an entry in shadow: su, from which Slurm gets the login environment, would refuse.
        "group": f"{Path('/etc/group').read_text()}{USER}:x:{uid}:\n",
        "slurm/slurm.conf": slurm_conf(state, shape),
        "slurm/gres.conf": gres_conf(state, shape),
        "slurm/oci.conf": OCI_CONF,
        **({"profile.d/slurm.sh": f"PATH={shape.slurm}/bin:{shape.slurm}/sbin:$PATH\n"} if shape.slurm else {}),
    }.items():
        (etc / name).parent.mkdir(exist_ok=True)
        (etc / name).unlink(missing_ok=True)  # it may be a link to the machine's own
        (etc / name).write_text(text)


def hosts(shape: Shape) -> str:
    lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost ip6-loopback"]
    for machine in ("login", *shape.names):
        for interface in NETWORKS:
            name = machine if interface == "eth0" else f"{machine}-{interface}"
            # Programs with IPv6 sockets look up the name of the mapped address.
            lines += [f"{form}{address(machine, interface)} {name} {name}.{DOMAIN}" for form in ("", "::ffff:")]
    return "\n".join(lines) + "\n"


def slurm_conf(state: Path, shape: Shape) -> str:
    gres = f" Gres=gpu:{shape.gpus_per_node}" if shape.gpus_per_node else ""
    conf = SLURM_CONF.format(state=state, nodes=shape.nodes, cpus=shape.cpus_per_node, gres=gres)
    return site.slurm_conf(conf, state, shape) if shape.site else conf


def gres_conf(state: Path, shape: Shape) -> str:
    last = shape.gpus_per_node - 1
    return f"AutoDetect=off\nName=gpu File={state}/gpus/gpu[0-{last}]\n" if shape.gpus_per_node else ""
