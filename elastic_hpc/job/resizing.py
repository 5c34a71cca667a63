"""Changes the bounds of a running job, or gives its nodes back; a job that waits to continue requests other nodes."""

from __future__ import annotations

import socket
import time
from dataclasses import replace

from elastic_hpc import slurm
from elastic_hpc.errors import ElasticError, SlurmError, UsageError
from elastic_hpc.job.look import Look
from elastic_hpc.network.client import ask_to_leave, ask_to_resize
from elastic_hpc.options.sbatch_lines import grows_elsewhere
from elastic_hpc.options.spec import LaunchSpec
from elastic_hpc.options.values import NodeRange
from elastic_hpc.record.events import append_event
from elastic_hpc.record.rundir import RunDir

_FORBIDDEN = "this site does not let a job give nodes back (SchedulerParameters=disable_job_shrink)"


def sizes_of(nodes: str, rundir: RunDir, look: Look) -> tuple[int, ...]:
    """The numbers of nodes that ``nodes``, written as for --nodes, means for this job, ascending. Raises UsageError."""
    try:
        wanted = NodeRange.parse(nodes)
    except UsageError as error:
        raise UsageError(str(error).replace("--nodes ", "", 1).replace("example --nodes", "example")) from None
    spec = replace(LaunchSpec.of_nodes(rundir.read("spec.json") or {}), nodes=wanted)
    return spec.sizes(int(look.story.limits.get("nproc_per_node", 1)))


def resize(sizes: tuple[int, ...], rundir: RunDir, look: Look) -> str:
    """Have the leader form only worlds of these ``sizes``. Returns what happens next. Raises ElasticError."""
    view = look.view
    own = len(view.nodes) - view.joiners
    if sizes[-1] < own and not slurm_lets_shrink(rundir):
        raise ElasticError(f"{_FORBIDDEN}: job {view.id} keeps its {own} nodes; expected a MAX of {own} or more")
    return ask_to_resize(rundir, sizes)


def release(nodes: tuple[str, ...], rundir: RunDir, look: Look) -> str:
    """Have the leader release ``nodes``. Returns what happens next. Raises ElasticError."""
    if not nodes:
        raise UsageError(f"expected the names of nodes of job {look.view.id}: {', '.join(look.view.nodes)}")
    brought = {joiner.node for joiner in look.story.joiners if joiner.left is None}
    if not brought.issuperset(nodes) and not slurm_lets_shrink(rundir):
        may_go = ", ".join(sorted(brought)) or "there is none"
        raise ElasticError(f"{_FORBIDDEN}: expected nodes that came by --grow: {may_go}")
    answers = []
    for asked, node in enumerate(nodes := tuple(dict.fromkeys(nodes))):
        try:
            answers.append(ask_to_leave(rundir, node, "the user releases it", give_back=True))
        except ElasticError as error:
            raise ElasticError(f"{error}; released: {', '.join(nodes[:asked])}" if asked else str(error)) from error
    return "; ".join(dict.fromkeys(filter(None, answers)))


def resize_waiting(nodes: str, sizes: tuple[int, ...], rundir: RunDir, look: Look, slurm_id: str) -> str:
    """Change the request for nodes of a job that waits to continue. Returns what happens next. Raises ElasticError."""
    options = rundir.read("spec.json")
    if options is None:
        id = look.view.id
        raise ElasticError(
            f"job {id} waits in the queue and has not started yet: type elastic-hpc stop {id}, then submit it "
            f"with --nodes {nodes}"
        )
    spec = LaunchSpec.of_nodes(options).resized(sizes[0], sizes[-1])
    slurm.change_nodes(slurm_id, spec.asks_slurm(grows_elsewhere=grows_elsewhere(rundir.script())).slurm)
    rundir.write_bounds(sizes)
    bounds = {"min_nodes": sizes[0], "max_nodes": sizes[-1], "sizes": nodes, "reason": "user"}
    append_event(rundir.path, socket.gethostname(), time.time(), "resize", bounds)
    return "it waits in the queue, and now requests as many"


def slurm_lets_shrink(rundir: RunDir) -> bool:
    """Whether the site lets a job give nodes back, as far as Slurm answers. True without Slurm."""
    try:
        return rundir.is_held() is not None or slurm.lets_shrink()
    except SlurmError:
        return True
