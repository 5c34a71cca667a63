"""What ``up --site`` adds: Slurm as sites configure it.

Accounting with limits that are enforced (slurmdbd, and a MariaDB of the cluster's own), control groups that constrain
jobs, a prolog, an epilog and a task prolog, a health check, private data, a job_submit script, preemption also by QOS;
and Slurm's defaults where mini-slurm otherwise sets shorter times. Tests change the site in the state directory:

* ``site/prolog_delay``, ``site/epilog_delay``, ``site/task_prolog_delay``: seconds that the script waits.
* ``site/sick-n2``: the health check drains n2 while the file exists.
* ``etc/slurm/slurm.conf``, after which slurmctld is restarted; ``etc/slurm/job_submit.lua``, which slurmctld reads at
  each submission.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from mini_slurm import cgroups
from mini_slurm.cluster import USER, Cluster, Shape
from mini_slurm.system import MiniSlurmError, say

DEADLINE_S = 60.0

# None: Slurm's default.
SETTINGS: dict[str, str | None] = {
    "ProctrackType": "proctrack/cgroup",
    "TaskPlugin": "task/cgroup,task/affinity",
    "JobAcctGatherType": "jobacct_gather/cgroup",
    "SelectTypeParameters": "CR_Core_Memory",
    "DefMemPerCPU": "{memory_per_cpu}",
    "AccountingStorageType": "accounting_storage/slurmdbd",
    "AccountingStorageHost": "login",
    "AccountingStoragePass": "{state}/run/munge.socket",
    "AccountingStorageEnforce": "associations,limits,qos",
    "AccountingStorageTRES": "gres/gpu",
    "SlurmdTimeout": None,
    "PrologFlags": "Alloc,Contain",
    "Prolog": "{state}/site/prolog",
    "Epilog": "{state}/site/epilog",
    "TaskProlog": "{state}/site/task_prolog",
    "HealthCheckProgram": "{state}/site/health_check",
    "HealthCheckInterval": "10",
    "DisableRootJobs": "YES",
    "PrivateData": "jobs,nodes",
    "JobSubmitPlugins": "lua",
    "LaunchParameters": "use_interactive_step",
}
WITHOUT_CGROUPS: dict[str, str | None] = {
    "ProctrackType": "proctrack/linuxproc",
    "TaskPlugin": "task/affinity",
    "JobAcctGatherType": "jobacct_gather/linux",
}

CGROUP_CONF = """\
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
ConstrainCores={cores}
ConstrainRAMSpace=yes
ConstrainDevices=yes
"""

SLURMDBD_CONF = """\
DbdHost=login
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={state}/run/munge.socket
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
PrivateData=jobs
LogFile={state}/log/slurmdbd.log
PidFile={state}/run/slurmdbd-login.pid
"""

JOB_SUBMIT = """\
-- A job without a time limit gets an hour; one of more than a week is refused.
function slurm_job_submit(job, partitions, uid)
   if job.time_limit == slurm.NO_VAL then
      job.time_limit = 60
      slurm.log_user("site: no time limit given, set to one hour")
   elseif job.time_limit > 7 * 24 * 60 then
      slurm.log_user("site: jobs run for a week at most, see --time")
      return slurm.ERROR
   end
   return slurm.SUCCESS
end

function slurm_job_modify(job, before, partitions, uid)
   return slurm.SUCCESS
end
"""

# What each script does after its delay. Slurm reads TaskProlog's standard output, which sets a variable of the task.
SCRIPTS = {
    "prolog": 'echo "$(date +%s) $SLURMD_NODENAME $SLURM_JOB_ID" >>{state}/log/prolog.log',
    "epilog": 'echo "$(date +%s) $SLURMD_NODENAME $SLURM_JOB_ID" >>{state}/log/epilog.log',
    "task_prolog": 'echo "export SITE_SCRATCH=/tmp/$SLURM_JOB_ID"',
}
HEALTH_CHECK = """\
#!/bin/sh
# Drains a node while site/sick-NODE exists, and brings it back after that.
node=$(hostname)
case $(scontrol show node "$node") in
*"Reason=health check"*) [ -e {state}/site/sick-"$node" ] || scontrol update NodeName="$node" State=RESUME ;;
*) [ ! -e {state}/site/sick-"$node" ] || scontrol update NodeName="$node" State=DRAIN Reason="health check: sick" ;;
esac
"""

MARIADB = (
    "--no-defaults",
    "--user=root",
    "--datadir={state}/mariadb",
    "--socket={state}/mariadb/socket",
    "--pid-file={state}/run/mariadbd-login.pid",
    "--log-error={state}/log/mariadb.log",
    "--skip-networking",
    "--skip-grant-tables",  # the socket is in a directory of root; who can reach it may do everything
    "--innodb-log-file-size=16M",
    "--innodb-lock-wait-timeout=900",
    "--innodb-flush-log-at-trx-commit=0",  # the data need not survive a crash
)

# QOS preemption takes effect with PreemptType=preempt/qos in slurm.conf.
QOS = (
    "low PreemptMode=requeue GraceTime=10",
    "lowcancel PreemptMode=cancel GraceTime=10",
    "high Priority=100 Preempt=low,lowcancel",
    "small MaxTRESPerJob=node=2 Flags=DenyOnLimit",
)


def slurm_conf(conf: str, state: Path, shape: Shape) -> str:
    """mini-slurm's slurm.conf, with a site's settings in place of its own."""
    settings = dict(SETTINGS)
    if not cgroups.usable():
        say(f"no control groups: {cgroups.ROOT} has not all of cgroup v1's {', '.join(cgroups.CONTROLLERS)}, writable")
        settings |= WITHOUT_CGROUPS
    values = {"state": state, "memory_per_cpu": 2000 // shape.cpus_per_node}
    for name, value in settings.items():
        conf = re.sub(rf"^{name}=.*\n", "", conf, flags=re.MULTILINE)
        if value is not None:
            conf = conf.replace("NodeName=", f"{name}={value.format_map(values)}\nNodeName=", 1)
    return conf


def write_files(state: Path, shape: Shape) -> None:
    (state / "site").mkdir()
    (state / "mariadb").mkdir(mode=0o700)
    slurm = state / "etc/slurm"
    cpus = len(os.sched_getaffinity(0))
    if shape.cpus_per_node > cpus:
        say(f"--cpus-per-node {shape.cpus_per_node}: this machine has {cpus}, so jobs are not confined to their cores")
    (slurm / "cgroup.conf").write_text(CGROUP_CONF.format(cores="yes" if shape.cpus_per_node <= cpus else "no"))
    (slurm / "job_submit.lua").write_text(JOB_SUBMIT)
    (slurm / "slurmdbd.conf").touch(mode=0o600)  # slurmdbd requires this mode
    (slurm / "slurmdbd.conf").write_text(SLURMDBD_CONF.format(state=state))
    for name, does in SCRIPTS.items():
        delay = f'sleep "$(cat {state}/site/{name}_delay 2>/dev/null || echo 0)"'
        write_script(state / "site" / name, f"#!/bin/sh\n{delay}\n{does.format(state=state)}\n")
    write_script(state / "site/health_check", HEALTH_CHECK.format(state=state))


def write_script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def start_accounting(cluster: Cluster) -> None:
    """Start MariaDB and slurmdbd on the login machine, and create the account of the cluster's user."""
    data, server = f"{cluster.state}/mariadb", [option.format(state=cluster.state) for option in MARIADB]
    # The data is in memory, which makes the first start seconds faster, and ends with the machine.
    cluster.inside("login", "mount", "-t", "tmpfs", "-o", "mode=0700,nosuid,nodev", "mariadb", data)
    cluster.inside("login", "mariadb-install-db", *server[:3], "--skip-test-db")
    cluster.inside("login", "sh", "-c", 'setsid "$@" >/dev/null 2>&1 &', "sh", "mariadbd", *server)
    # slurmdbd would create the database, but its connection would then not work with MariaDB 11.8.9's client library.
    make = "CREATE DATABASE IF NOT EXISTS slurm; SELECT 1"
    client = ("mariadb", "--no-defaults", f"--socket={data}/socket", f"--execute={make}")
    wait_for(cluster, "MariaDB", lambda: "1" in cluster.inside("login", *client, check=False))
    cluster.inside("login", "env", f"MYSQL_UNIX_PORT={data}/socket", "slurmdbd")
    add = ["sacctmgr", "--immediate", "--quiet", "add"]
    wait_for(cluster, "slurmdbd", lambda: "normal" in cluster.slurm("sacctmgr", "show", "qos", check=False))
    cluster.slurm(*add, "cluster", "mini")
    for qos in QOS:
        cluster.slurm(*add, "qos", *qos.split())
    cluster.slurm(*add, "account", "research", "Description=research", "Organization=site")
    names = ",".join(["normal", *(qos.split()[0] for qos in QOS)])
    cluster.slurm(*add, "user", USER, "Account=research", f"QOS={names}", "DefaultQOS=normal", "MaxSubmitJobs=100")


def wait_for(cluster: Cluster, what: str, answers: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not answers():
        if time.monotonic() > deadline:
            raise MiniSlurmError(
                f"{what} does not answer after {DEADLINE_S:.0f} s; the logs say:\n{cluster.log_tail()}"
            )
        time.sleep(0.1)
