"""The options of a job from Python, for type checkers and editors: no program imports this module when it runs.

``tests/unit/test_from_python.py`` compares these types with the tables by which the options are checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from os import PathLike
from typing import TypeAlias, TypedDict

Text: TypeAlias = str | int | PathLike[str] | None
Words: TypeAlias = Text | Sequence[str | int] | set[str]
Number: TypeAlias = int | str | None
Time: TypeAlias = timedelta | float | str | None
"""A length of time for our options; a number is in seconds."""
Switch: TypeAlias = bool | str | None
Flag: TypeAlias = bool | None
Nodes: TypeAlias = int | str | tuple[int, ...] | list[int] | range
"""``(4, 8)`` is MIN and MAX; more than two are exact numbers."""

LaunchOptions = TypedDict("LaunchOptions", {  # noqa: UP013 - a table in rows
    "nodes": Nodes, "spares": Number, "world_multiple_of": Number, "grow_every": Time, "free_growth": Switch,
    "wait_for_nodes": Time, "nproc_per_node": Text, "max_restarts": Number, "rdzv_endpoint": Text, "rdzv_id": Text,
    "rdzv_conf": str | Mapping[str, float | timedelta] | None, "heartbeat_timeout": Time, "grace": Time,
    "drain_signal": Text | bool, "hang_timeout": Time, "slow_node": Text | float, "preload": Words | bool,
    "preflight": Text, "health_dir": Text, "interface": Text, "role": Text, "tee": Words, "local_ranks_filter": Words,
    "numa_binding": Text,
}, total=False)  # fmt: skip
"""How the agents run the workers; for JobSpec.of and LaunchConfig."""

TorchrunOptions = TypedDict("TorchrunOptions", {  # noqa: UP013 - a table in rows
    "nnodes": Nodes, "standalone": Flag, "master_addr": Text, "master_port": Text, "rdzv_backend": Text,
    "node_rank": Text, "monitor_interval": Text | float, "start_method": Text, "event_log_handler": Text,
    "redirects": Text, "duplicate_stdout_filters": Text, "duplicate_stderr_filters": Text,
    "logs_specs": Text, "local_addr": Text, "signals_to_handle": Text, "shutdown_timeout": Text,
    "virtual_local_rank": Flag, "run_path": Flag, "use_env": Flag,
}, total=False)  # fmt: skip
"""Options of torchrun that have other names here; see docs/torchrun.md."""

SbatchOptions = TypedDict("SbatchOptions", {  # noqa: UP013 - a table in rows
    "account": Text, "acctg_freq": Words, "array": Words | range, "batch": Text, "bb": Text, "bbf": Text,
    "begin": Text | timedelta | date, "chdir": Text, "cluster_constraint": Text, "clusters": Words, "comment": Text,
    "consolidate_segments": Flag, "constraint": Text, "container": Text, "container_id": Text,
    "container_type": Text, "contiguous": Flag, "core_spec": Text, "cores_per_socket": Text, "cpu_freq": Text,
    "cpus_per_gpu": Text, "cpus_per_task": Text, "deadline": Text | timedelta | date,
    "delay_boot": Text | timedelta, "dependency": Words, "distribution": Text, "error": Text, "exclude": Words,
    "exclusive": Switch | int, "export": Words, "export_file": Text, "extra": Text, "extra_node_info": Text,
    "get_user_env": Switch | int, "gid": Text, "gpu_bind": Text, "gpu_freq": Text, "gpus": Text,
    "gpus_per_node": Text, "gpus_per_socket": Text, "gres": Words, "gres_flags": Text, "hint": Text, "hold": Flag,
    "ignore_pbs": Flag, "input": Text, "job_name": Text, "kill_on_invalid_dep": Text, "licenses": Words,
    "mail_type": Words, "mail_user": Text, "mcs_label": Text, "mem": Text, "mem_bind": Text, "mem_per_cpu": Text,
    "mem_per_gpu": Text, "mem_update": Text, "mincpus": Text, "network": Text, "nice": Switch | int,
    "no_kill": Switch | int, "nodefile": Text, "nodelist": Words, "ntasks": Text, "ntasks_per_core": Text,
    "ntasks_per_node": Text, "ntasks_per_socket": Text, "oom_kill_step": Switch | int, "open_mode": Text,
    "output": Text, "overcommit": Flag, "oversubscribe": Flag, "partition": Words, "power": Text, "prefer": Text,
    "priority": Text, "profile": Words, "propagate": Words, "qos": Words, "reboot": Flag, "requeue": Switch | int,
    "reservation": Words, "resources": Text, "resv_ports": Switch | int, "segment": Text, "share": Flag,
    "signal": Text, "sockets_per_node": Text, "spread_job": Flag, "spread_segments": Flag, "stepmgr": Flag,
    "switches": Text, "tasks_per_node": Text, "thread_spec": Text, "threads_per_core": Text,
    "time": Text | timedelta, "time_min": Text | timedelta, "tmp": Text, "tres_bind": Text, "uid": Text,
    "wait_all_nodes": Text, "wckey": Text,
}, total=False)  # fmt: skip
"""Options of sbatch that an elastic job may have. Times are in sbatch's own notation, or a timedelta."""


JoinerOptions = TypedDict("JoinerOptions", {  # noqa: UP013 - a table in rows
    "grow_partition": Words, "grow_qos": Words, "grow_account": Text, "grow_constraint": Text,
    "grow_time": Text | timedelta, "grow_gres": Words, "grow_gpus_per_node": Text, "grow_cpus_per_task": Text,
    "grow_mem": Text, "grow_exclusive": Switch | int, "grow_nice": Switch | int, "grow_reservation": Words,
    "grow_time_min": Text | timedelta,
}, total=False)  # fmt: skip
"""The useful options of sbatch for joiners; ``sbatch={"grow-NAME": ...}`` accepts any other."""


class JobOptions(LaunchOptions, TorchrunOptions, SbatchOptions, JoinerOptions, total=False):
    """All options that JobSpec.of takes by name."""

    grow: Switch
    yield_to: Text
    yield_every: Time
    max_requeues: Number
    log_dir: Text
    template: Text
    python: Text | Sequence[str]
    container_image: Text
    container_mounts: Words
    container_runtime: Text
    snapshot: Switch
    notify: Text
    notify_after: Time
