"""The commands in a batch script: srun, the agent, torchrun, and the container around them. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain

from elastic_hpc.job.quoting import Shell, joined, quote
from elastic_hpc.options.spec import LaunchSpec
from elastic_hpc.options.values import TORCHRUNS_STREAMS, RdzvConf
from elastic_hpc.start import module_command


@dataclass(frozen=True)
class Container:
    """The container of the agents and their workers. The batch script stays outside, where Slurm's commands are."""

    image: str
    runtime: str = "pyxis"  # a plugin of srun; oci, srun's own; or apptainer, a command in front of the agent's
    mounts: str | None = None  # SRC:DST[:FLAGS],... besides the working directory and the run directory

    def srun_options(self, folders: str, env: Collection[str]) -> list[str]:
        """``folders``: "SRC:DST,..." for bash. ``env``: variables that override the image's variables."""
        if self.runtime == "oci":
            return [f"--container={self.image}"]
        if self.runtime != "pyxis":
            return []
        options = [f"--container-image={self.image}", joined("--container-mounts=", self._mounts(folders))]
        options.append(Shell('--container-workdir="$PWD"'))
        return [*options, *([f"--container-env={','.join(env)}"] if env else [])]

    def around(self, command: Sequence[str], folders: str, env: Collection[str], *, gpus: bool) -> list[str]:
        """``command``, run in the container. For apptainer, ``env`` is exported under other names (prepare.j2)."""
        if self.runtime == "pyxis":
            return list(command)
        if self.runtime == "oci":  # the bundle's config.json sets the working directory, and variables before srun's
            given = [joined(f"{name}=", Shell(f'"${name}"')) for name in env]
            return ["env", joined("--chdir=", Shell('"$PWD"')), *given, *command]
        words = ["apptainer", "exec", "--bind", self._mounts(folders), "--pwd", Shell('"$PWD"')]
        return [*words, *(["--nv"] if gpus else []), self.image, *command]

    def _mounts(self, folders: str) -> Shell:
        return Shell(f'"{folders}"' + (f",{quote(self.mounts)}" if self.mounts else ""))


def srun_options(nodes: str, cpus_per_task: str | None = None) -> list[str]:
    """Options of srun for one agent per node that outlives other nodes, in elastic-srun and in the batch script.

    ``cpus_per_task``: the value that the job requested; since Slurm 22.05, srun does not inherit it from sbatch.
    """
    options = [joined("--nodes=", nodes), joined("--ntasks=", nodes), "--ntasks-per-node=1"]
    options += ["--no-kill", "--kill-on-bad-exit=0", "--wait=0", "--cpu-bind=none"]
    if cpus_per_task is not None:
        options.append(joined("--cpus-per-task=", cpus_per_task))
    return options


def agent_options(launch: LaunchSpec, head: str) -> list[tuple[str, str]]:
    """The options of each agent, with their values. ``head`` hosts the rendezvous unless the user named a host."""
    ours = joined("", head, f":{launch.rdzv_endpoint.port}") if launch.rdzv_endpoint.head is None else None
    return [(flag, ours if ours and flag == "--rdzv-endpoint" else value) for flag, value in launch.options()]


def agent_command(
    launch: LaunchSpec,
    *,
    head: str,
    run_dir: str,
    python: Sequence[str],
    can_requeue: bool = True,
    contained: bool = False,
) -> list[str]:
    """The command of each agent. ``contained``: the agent runs in a container, without Slurm's commands."""
    words = module_command(python, "elastic_hpc.agent", unbuffered=True)
    words += chain.from_iterable(agent_options(launch, head))
    if not can_requeue:
        words.append("--no-requeue")
    if contained:
        words.append("--contained")
    return [*words, "--run-dir", run_dir, *launch.command()]


def torchrun_command(
    launch: LaunchSpec,
    *,
    head: str,
    job_id: str,
    python: Sequence[str],
    log_dir: str | None = None,
    others: Sequence[str] = (),
) -> list[str]:
    """The command of torchrun's quickstart for the same job. ``others``: options that only torchrun has."""
    endpoint = launch.rdzv_endpoint
    words = module_command(python, "torch.distributed.run", f"--nnodes={launch.nodes}", unbuffered=True)
    words += [f"--nproc-per-node={launch.nproc_per_node}"] if launch.nproc_per_node else []
    words += [
        f"--max-restarts={launch.max_restarts}",
        joined("--rdzv-id=", launch.rdzv_id or job_id),
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={endpoint}" if endpoint.head else joined("--rdzv-endpoint=", head, f":{endpoint.port}"),
    ]
    same = {
        "rdzv-conf": str(launch.rdzv_conf) if launch.rdzv_conf != RdzvConf() else None,
        "role": launch.role,
        "tee": launch.tee if TORCHRUNS_STREAMS.fullmatch(launch.tee or "") else None,
        "local-ranks-filter": launch.local_ranks_filter,
        "numa-binding": launch.numa_binding,
        "log-dir": log_dir,
    }
    words += [f"--{name}={value}" for name, value in same.items() if value is not None]
    return [*words, *others, *launch.command()]
