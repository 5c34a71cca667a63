"""sbatch's options from its variables, such as ``SBATCH_ACCOUNT``, which many sites set in the profile. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from elastic_hpc.errors import UsageError
from elastic_hpc.options.sbatch import INSTEAD_OF_CONTAINER, SBATCH, Given, Option, check, is_for_containers

# The variables that sbatch of Slurm 22.05 to 26.05 reads, without SBATCH_; after = the option, if its name differs.
# sbatch ignores SBATCH_NODES, SBATCH_MAIL_USER and the like.
_TABLE = """
ACCOUNT ACCTG_FREQ ARRAY_INX=array BATCH CLUSTERS CLUSTER_CONSTRAINT CONSOLIDATE_SEGMENTS CONSTRAINT CONTAINER
CONTAINER_ID CORE_SPEC CPUS_PER_GPU CPU_FREQ_REQ=cpu-freq DELAY_BOOT DISTRIBUTION ERROR EXCLUSIVE EXPORT GET_USER_ENV
GPUS GPUS_PER_NODE GPUS_PER_TASK GPU_BIND GPU_FREQ GRES GRES_FLAGS HINT IGNORE_PBS INPUT JOB_NAME MEM_BIND MEM_PER_CPU
MEM_PER_GPU MEM_PER_NODE=mem NETWORK NO_KILL NO_REQUEUE OPEN_MODE OUTPUT OVERCOMMIT PARTITION POWER PROFILE QOS REQUEUE
REQ_SWITCH=switches RESERVATION SEGMENT_SIZE=segment SIGNAL SPREAD_JOB THREADS_PER_CORE THREAD_SPEC TIMELIMIT=time
TRES_BIND TRES_PER_TASK USE_MIN_NODES WAIT_ALL_NODES WCKEY
"""
_OPTIONS = {
    f"SBATCH_{name}": SBATCH[option or name.lower().replace("_", "-")]
    for name, _, option in (row.partition("=") for row in _TABLE.split())
}
# Inside a job Slurm sets these itself, for that job.
_OUTSIDE = {"SLURM_CLUSTERS": SBATCH["clusters"], "SLURM_HINT": SBATCH["hint"]}
_OF_A_JOB = "SBATCH_MEM_BIND"
_SPEAKING = {"SBATCH_WAIT": SBATCH["wait"], "SBATCH_DEBUG": SBATCH["verbose"]}


def from_environment(environ: Mapping[str, str]) -> tuple[list[Given], list[str]]:
    """The options that ``environ`` sets, and a note for each option that an elastic job cannot have. Such an option is
    dropped and not refused, because the user has not typed it for this job.
    """
    inside = "SLURM_JOB_ID" in environ
    options = {**({} if inside else _OUTSIDE), **_OPTIONS}
    given, dropped = [], []
    for name, option in options.items():
        if name not in environ or (inside and name == _OF_A_JOB):
            continue
        text = environ[name]
        if option.name == "switches" and "SBATCH_WAIT4SWITCH" in environ:
            text += f"@{environ['SBATCH_WAIT4SWITCH']}"
        if option.value != "=" and not _is_on(text, option):
            continue
        found = Given(option, text if option.value == "=" or text not in _ON else None, f"environment: {name}")
        if is_for_containers(option.name):
            dropped.append(f"{name} in the environment is not used: {found}: {INSTEAD_OF_CONTAINER}")
            continue
        try:
            if check(found):
                given.append(found)
        except UsageError as error:
            dropped.append(f"{name} in the environment is not used: {error}")
    return given, dropped


def for_sbatch_itself(environ: Mapping[str, str]) -> list[str]:
    """The flags that ``environ`` sets and that are not about the job, such as ``--wait``."""
    return [option.flag for name, option in _SPEAKING.items() if name in environ and _is_on(environ[name], option)]


_ON = ("", "yes", "1")


def _is_on(text: str, option: Option) -> bool:
    """Whether ``text`` turns the option on, as sbatch reads it. An option that may take a value takes ``text``."""
    if option.value:
        return text not in {"no", "0"}
    return text in _ON or (text.isdecimal() and int(text) != 0)
