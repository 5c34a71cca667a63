"""The executors as submitit sees them, and functions on this machine without Slurm."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import submitit
from sharedfs import Two
from submitit.core import plugins, utils
from submitit.slurm.slurm import SlurmExecutor

from elastic_hpc.errors import ElasticError, UsageError
from elastic_hpc.job import functions
from elastic_hpc.submitit.executors import ElasticExecutor, ElasticLocalExecutor
from elastic_hpc.submitit.jobs import ElasticLocalJob


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an sbatch that accepts everything and stores the submitted script as ``script``."""
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ncat > {tmp_path}/script; echo 17\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def directives(folder: Path) -> set[str]:
    lines = (folder / "script").read_text().splitlines()
    return {line.partition(" # ")[0].removeprefix("#SBATCH ").strip() for line in lines if line.startswith("#SBATCH")}


def test_both_executors_are_found_and_neither_is_chosen_unless_requested(sbatch: Path) -> None:
    assert plugins.get_executors()["elastic"] is ElasticExecutor
    assert plugins.get_executors()["elastic-local"] is ElasticLocalExecutor
    assert submitit.AutoExecutor.which() in {"slurm", "local"}
    assert max(ElasticExecutor.affinity(), ElasticLocalExecutor.affinity()) < submitit.LocalExecutor.affinity()


def test_the_package_declares_each_entry_point_once_and_the_second_executor_comes_with_the_first() -> None:
    declared = [line for line in declaration("project.entry-points.submitit") if "=" in line]
    names = [line.partition("=")[0].strip('" ') for line in declared]
    assert names == ["executor", "job_environment"]
    for _ in range(2):
        assert list(plugins.get_executors())[-2:] == ["elastic", "elastic-local"]
        plugins._get_plugins.cache_clear()
        plugins.get_executors.cache_clear()


def declaration(section: str) -> list[str]:
    """The lines of a section of pyproject.toml."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    return text.partition(f"[{section}]\n")[2].partition("\n[")[0].splitlines()


BEHAVIOUR = """
import json, os, sys, warnings
hide = sys.argv[1] == "hidden"
if hide:
    from importlib import metadata
    shown = metadata.entry_points
    metadata.entry_points = lambda: metadata.EntryPoints(
        entry for entry in shown(group="submitit") if not entry.value.startswith("elastic_hpc"))
import submitit
from submitit.core import plugins

def outcome(do):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            result = do()
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
    return [str(result), sorted(str(each.message) for each in warned)]

def update(cluster, **parameters):
    def do():
        executor = submitit.AutoExecutor("jobs", cluster=cluster)
        executor.update_parameters(**parameters)
        return sorted(executor.parameters.items())
    return outcome(do)

def environment(**variables):
    with submitit.helpers.environment_variables(**variables):
        return outcome(lambda: type(submitit.JobEnvironment()).__name__)

said = {
    "which": outcome(submitit.AutoExecutor.which),
    "chosen": outcome(lambda: submitit.AutoExecutor("jobs").cluster),
    "unknown": outcome(lambda: submitit.AutoExecutor("jobs", cluster="nix")),
    "argument": outcome(lambda: submitit.AutoExecutor("jobs", cluster="local", local_x=3)),
    "slurm argument": outcome(lambda: submitit.AutoExecutor("jobs", cluster="local", slurm_max_num_timeout=3).cluster),
    "old argument": outcome(lambda: submitit.AutoExecutor("jobs", cluster="local", max_num_timeout=3).cluster),
    "outside": outcome(lambda: sorted(plugins.get_job_environment())),
    "envs": [environment(SUBMITIT_EXECUTOR=name) for name in ("slurm", "local", "debug", "nix", "")],
    "tests": [environment(_TEST_CLUSTER_=name) for name in ("slurm", "local", "debug")],
    "first": [list(plugins.get_executors())[:3], list(plugins.get_job_environments())[:3]],
    "logged": outcome(lambda: submitit.AutoExecutor("jobs", cluster="debug").submit(abs, -3).result()),
}
for cluster in ("slurm", "local", "debug"):
    for parameters in (
        {"nodes": "4:8"}, {"nodes": 2, "timeout_min": 9}, {"timeout_min": "9"}, {"slurm_partition": "gpu"},
        {"slurm_partiton": "gpu"}, {"partition": "gpu"}, {"max_restarts": 3}, {"env": {}}, {"spares": 1},
        {"grow": True}, {"interface": "ib0"}, {"setup": ["x"]}, {"nix_x": 1}, {"slurm_time": 3, "timeout_min": 9},
        {"local_setup": ["x"]}, {"name": 3}, {"mem_gb": 0.5}, {"python": "x"}, {"slurm_max_restarts": 3},
        {"nodes": None}, {"slurm_reservation": "x"},
    ):
        said[f"{cluster} {parameters}"] = update(cluster, **parameters)
text = json.dumps(said)
known = ", elastic, elastic-local"
print(text.replace(known, "").replace(", elastic.", "."))
"""


def test_submitit_is_unchanged_for_those_who_do_not_use_this_package(sbatch: Path) -> None:
    """Its choice of a cluster, its parameters, errors, warnings and environments are unchanged; only the lists of all
    executors and environments also name ours.
    """
    (sbatch / "bin" / "srun").symlink_to("sbatch")
    (sbatch / "behaviour.py").write_text(BEHAVIOUR)
    environ = {**os.environ, "PYTHONHASHSEED": "0"}  # submitit lists sets
    ran = [
        subprocess.run([sys.executable, "behaviour.py", how], env=environ, capture_output=True, text=True, check=True)
        for how in ("hidden", "shown")
    ]
    hidden, shown = (json.loads(each.stdout.splitlines()[-1]) for each in ran)
    assert len(hidden) > 60
    assert shown == hidden
    assert ran[0].stderr == ran[1].stderr


def test_looking_for_executors_imports_little_and_needs_nothing_that_only_jobs_need(tmp_path: Path) -> None:
    """Submitit always looks for executors. A package that cannot be imported simulates a broken installation."""
    (tmp_path / "broken").mkdir()
    for name in ("torch", "jinja2", "asyncio", "rich"):
        (tmp_path / "broken" / f"{name}.py").write_text("raise RuntimeError('broken')")
    (tmp_path / "elastic_hpc.toml").write_text("broken")
    code = (
        "import asyncio, sys, submitit.core.plugins as p; before = set(sys.modules);"
        "sys.path.insert(0, 'broken');"
        "print(*p.get_executors(), *p.get_job_environments());"
        "print(*sorted(m for m in set(sys.modules) - before if m.startswith('elastic_hpc.')))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    names, modules = ran.stdout.splitlines()
    assert names == "slurm local debug elastic elastic-local slurm local debug elastic"
    assert set(modules.split()) <= {f"elastic_hpc.{name}" for name in LIGHT}
    assert ran.stderr == ""


LIGHT = {
    *("environment", "errors", "job", "job.functions", "record", "record.events", "record.folders", "record.rundir"),
    *("submitit", "submitit.environment", "submitit.executors"),
}


def test_a_broken_plugin_of_another_package_is_reported_as_usual_and_a_good_one_is_found(tmp_path: Path) -> None:
    for name, executor in ("good", "GoodExecutor"), ("bad", "NoneAtAll"):
        (tmp_path / f"submitit_{name}.py").write_text("import submitit\nclass GoodExecutor(submitit.Executor): pass\n")
        info = tmp_path / f"submitit_{name}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: submitit_{name}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[submitit]\nexecutor = submitit_{name}:{executor}\n")
    code = "import submitit.core.plugins as p; print(*sorted(p.get_executors()))"
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "debug elastic elastic-local good local slurm"
    assert "Failed to load submitit plugin 'submitit_bad': module 'submitit_bad' has no attribute" in ran.stderr
    assert ran.stderr.count("Traceback") == 1


@pytest.mark.parametrize(
    ("cluster", "parameters", "complaint"),
    [
        ("elastic", {"slurm_partiton": "gpu"}, "Unknown argument 'partiton' for executor 'slurm'"),
        ("elastic", {"elastic_max_restart": 3}, "Did you mean 'elastic_max_restarts'?"),
        ("elastic", {"partiton": "gpu"}, "Parameter 'partiton' need to be prefixed by an executor name"),
        ("elastic", {"max_restarts": 3}, "Unknown executor 'max' in parameter 'max_restarts'"),
        ("elastic", {"local_setups": []}, "Unknown argument 'setups' for executor 'local'"),
        ("elastic-local", {"slurm_partiton": "gpu"}, "Unknown argument 'partiton' for executor 'slurm'"),
        ("elastic-local", {"elastic_max_restart": 3}, "Did you mean 'elastic_max_restarts'?"),
        ("local", {"elastic_max_restart": 3}, "Did you mean 'elastic_max_restarts'?"),
        ("debug", {"elastic_nix": 3}, "Unknown argument 'nix' for executor 'elastic'"),
    ],
)
def test_misspelt_parameters_are_refused_as_submitit_refuses_them(
    sbatch: Path, cluster: str, parameters: dict[str, Any], complaint: str
) -> None:
    executor = submitit.AutoExecutor("jobs", cluster=cluster)
    with pytest.raises(NameError, match=re.escape(complaint)):
        executor.update_parameters(**parameters)
    with pytest.raises(AssertionError, match='Parameter "timeout_min" expected type'):
        executor.update_parameters(timeout_min="9")
    assert executor.parameters == {}


def test_every_parameter_of_submitits_executor_for_slurm_means_the_same_or_is_refused_with_a_reason(
    sbatch: Path,
) -> None:
    means = {
        "job_name": ("mine", "--job-name=mine"),
        "partition": ("gpu", "--partition=gpu"),
        "time": (9, "--time=9"),
        "nodes": (2, "--nodes=2"),
        "ntasks_per_node": (2, "--nproc-per-node 2"),
        "cpus_per_task": (3, "--cpus-per-task=3"),
        "cpus_per_gpu": (3, "--cpus-per-gpu=3"),
        "num_gpus": (2, "--gpus-per-node=2"),
        "gpus_per_node": ("a100:2", "--gpus-per-node=a100:2"),
        "gpus_per_task": (1, "gpus-per-task=1: it hides the GPUs"),
        "qos": ("high", "--qos=high"),
        "setup": ("module load cuda", "\nmodule load cuda\n"),
        "teardown": (["x"], "teardown: the batch script may be lost"),
        "mem": ("3GB", "--mem=3G"),
        "mem_per_gpu": ("3G", "--mem-per-gpu=3G"),
        "mem_per_cpu": ("3G", "--mem-per-cpu=3G"),
        "signal_delay_s": (30, "--grace 30"),
        "comment": ("it's", '--comment="it\'s"'),
        "constraint": ("a&b", "--constraint="),
        "exclude": ("n1", "--exclude=n1"),
        "account": ("me", "--account=me"),
        "gres": ("disk:1", "--gres=disk:1"),
        "mail_type": ("END", "--mail-type=END"),
        "mail_user": ("me", "--mail-user=me"),
        "nodelist": ("n2", "--nodelist=n2"),
        "dependency": ("afterok:3", "--dependency=afterok:3"),
        "exclusive": ("user", "--exclusive=user"),
        "array_parallelism": (1, "--array=0-1%1"),
        "wckey": ("key", "--wckey=key"),
        "stderr_to_stdout": (True, "stderr_to_stdout: stdout and stderr of a rank are files of their own"),
        "additional_parameters": ({"gpu-power": 3, "time": "1:00:00"}, "--gpu-power=3"),
        "srun_args": (["--x"], "srun_args: elastic_hpc writes its own srun line"),
        "use_srun": (False, "use_srun=False: srun starts the agents"),
    }
    assert set(means) == SlurmExecutor._valid_parameters()
    for name, (value, meaning) in means.items():
        executor = submitit.AutoExecutor("jobs", cluster="elastic")
        executor.update_parameters(timeout_min=7)
        try:
            executor.update_parameters(**{f"slurm_{name}": value})
            executor.map_array(print, [1, 2])
            said = (sbatch / "script").read_text()
        except UsageError as refused:
            said = str(refused)
        assert meaning in said, name


def test_constructor_arguments_for_slurm_apply_to_the_elastic_clusters_too(sbatch: Path) -> None:
    for cluster in ("elastic", "elastic-local"):
        executor = submitit.AutoExecutor(
            "jobs", cluster=cluster, slurm_max_num_timeout=30, elastic_max_pickle_size_gb=2
        )
        assert (executor._executor.max_num_timeout, executor._executor.max_pickle_size_gb) == (30, 2)
    executor = submitit.AutoExecutor("jobs", cluster="elastic", slurm_python="/opt/python")
    executor.submit(print)
    assert "/opt/python" in (sbatch / "script").read_text()


def test_parameters_become_options_of_the_job(sbatch: Path) -> None:
    executor = submitit.AutoExecutor("jobs", cluster="elastic")
    executor.update_parameters(
        nodes="4:8",
        gpus_per_node=8,
        cpus_per_task=32,
        tasks_per_node=8,
        timeout_min=90,
        mem_gb=100.5,
        name="mine",
        local_setup=["of no concern here"],
        slurm_partition="gpu",
        slurm_setup=["module load cuda"],
        slurm_signal_delay_s=30,
        slurm_additional_parameters={"reservation": "tuesday"},
        slurm_exclusive=True,
        slurm_time=60,
        elastic_max_restarts=3,
        elastic_grow=True,
        elastic_env={"NAME": "a value"},
    )
    executor.submit(print)
    assert directives(sbatch) >= {
        "--nodes=4-8",
        "--gpus-per-node=8",
        "--cpus-per-task=256",  # a task is an agent for Slurm, and a worker for submitit
        "--time=60",
        "--mem=102912M",
        "--job-name=mine",
        "--partition=gpu",
        "--reservation=tuesday",
        "--exclusive",
        "--signal=B:URG@60",
        f"--output={sbatch}/jobs/elastic/%j.log",
    }
    script = (sbatch / "script").read_text()
    assert "module load cuda\n" in script
    assert "export NAME='a value'\n" in script
    assert "export SUBMITIT_EXECUTOR=elastic\n" in script
    for words in ("--nproc-per-node 8", "--max-restarts 3", "--grow on", "--grace 30", "submitit.core._submit"):
        assert words in script
    assert (sbatch / "jobs" / "17_submission.sh").read_text() == script


def test_functions_submitted_together_are_an_array_and_each_task_has_its_pickle(sbatch: Path) -> None:
    executor = submitit.AutoExecutor("jobs", cluster="elastic")
    executor.update_parameters(nodes=2, slurm_array_parallelism=2)
    jobs = executor.map_array(print, [1, 2, 3])
    assert [job.job_id for job in jobs] == ["17_0", "17_1", "17_2"]
    assert {"--array=0-2%2", f"--output={sbatch}/jobs/elastic/%A_%a.log"} <= directives(sbatch)
    assert [job.submission().args for job in jobs] == [(1,), (2,), (3,)]


@pytest.mark.parametrize(
    ("parameters", "complaint"),
    [
        ({"nodes": "8:4"}, "--nodes '8:4': expected N or MIN:MAX"),
        ({"nodes": 2, "slurm_ntasks_per_gpu": 2}, "elastic-sbatch starts one agent per node"),
        ({"nodes": 2, "slurm_srun_args": ["--x"]}, "srun_args: elastic_hpc writes its own srun line"),
        ({"nodes": 2, "stderr_to_stdout": True}, "stderr_to_stdout"),
        ({"nodes": 2, "elastic_log_dir": "x"}, "log_dir: the run directories are in the executor's folder"),
        ({"nodes": 2, "elastic_max_restarts": -1}, "--max-restarts '-1': expected a whole number"),
    ],
)
def test_parameters_that_an_elastic_job_cannot_have_are_refused_when_they_are_set(
    sbatch: Path, parameters: dict[str, Any], complaint: str
) -> None:
    executor = submitit.AutoExecutor("jobs", cluster="elastic")
    with pytest.raises(UsageError) as refused:
        executor.update_parameters(**parameters)
    assert complaint in str(refused.value)
    executor.submit(print)  # the earlier parameters are unchanged


def test_a_refused_job_leaves_no_pickle_behind(sbatch: Path) -> None:
    (sbatch / "bin" / "sbatch").write_text("#!/bin/sh\necho sbatch: error: invalid partition >&2; exit 1\n")
    executor = ElasticExecutor("jobs")
    with pytest.raises(utils.FailedJobError, match="invalid partition"):
        executor.submit(print)
    with pytest.raises(utils.FailedJobError, match="invalid partition"):
        executor.map_array(print, [1, 2])
    executor.max_pickle_size_gb = 1e-9
    with pytest.raises(RuntimeError, match="max_pickle_size_gb"):
        executor.submit(print, "x" * 1000)
    assert not list((sbatch / "jobs").glob("*.pkl"))


def test_an_executor_for_another_cluster_keeps_its_own_rules(tmp_path: Path) -> None:
    executor = submitit.AutoExecutor(tmp_path, cluster="local")
    with pytest.raises(AssertionError):
        executor.update_parameters(nodes="4:8")
    executor.update_parameters(elastic_max_restarts=3, timeout_min=3)
    assert executor._executor.parameters == {"timeout_min": 3}


# assumptions about submitit


def test_submitit_has_no_elastic_sizes_of_its_own() -> None:
    """When submitit supports them, we no longer need to replace the parameters of its AutoExecutor."""
    assert submitit.AutoExecutor._typed_parameters()["nodes"] is int


def test_submitits_worker_reads_its_folder_and_writes_to_the_path_in_the_environment() -> None:
    code = "import inspect, submitit.core.submission as s; print(inspect.getsource(s.process_job))"
    source = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for used in (
        "JobEnvironment()",
        "paths.submitted_pickle",
        "paths.result_pickle",
        "_handle_signals(paths, delayed)",
    ):
        assert used in source
    done = subprocess.run(
        [sys.executable, "-m", functions.MODULE, "--help"], capture_output=True, text=True, check=True
    )
    assert "folder" in done.stdout


# without Slurm


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[submitit.AutoExecutor]:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    executor = submitit.AutoExecutor(tmp_path / "jobs", cluster="elastic-local")
    executor.update_parameters(nodes="1:2", slurm_partition="of no concern here")
    return executor


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root: sudo make test")
def test_the_ranks_leave_immediately_when_rank_0_has_saved_even_if_each_is_on_a_different_node(tmp_path: Path) -> None:
    two = Two(tmp_path)
    two.server.behave(names_s=600)
    script = """
import sys
from pathlib import Path
from types import SimpleNamespace
from elastic_hpc.submitit import worker

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
worker.is_told_to_drain, worker._LEAVE = lambda: True, 600
env, paths = SimpleNamespace(global_rank=rank, num_tasks=2), SimpleNamespace(result_pickle=folder / f"{rank}.pkl")
handler = worker.DrainHandler(env, paths, None, folder)
handler._watch() if rank else handler._exit()
"""
    try:
        assert not (two.a / "left.1").exists()
        assert not (two.b / "saved").exists()
        command = [sys.executable, "-c", script]
        ranks = [subprocess.Popen([*command, str(rank), str(path)]) for rank, path in ((1, two.b), (0, two.a))]
        assert [rank.wait(timeout=60) for rank in ranks] == [0, 0]
    finally:
        two.server.close()


def test_functions_run_on_this_machine_and_their_jobs_can_be_pickled(local: submitit.AutoExecutor) -> None:
    def where(exponent: int) -> tuple[int, ...]:
        env = submitit.JobEnvironment()
        print("rank", env.global_rank)
        return env.global_rank, env.num_tasks, env.num_nodes, 2**exponent

    job = local.submit(where, 5)
    assert job.state == "RUNNING"
    assert not job.done()
    again = pickle.loads(pickle.dumps(job))
    assert again.results() == [(0, 2, 2, 32), (1, 2, 2, 32)]
    assert job.result() == (0, 2, 2, 32)
    assert (job.state, job.exception(), job.num_tasks) == ("COMPLETED", None, 2)
    assert "rank 1\n" in job.task(1).stdout()
    assert job.task(1).result() == (1, 2, 2, 32)
    assert job.paths.stderr.name == "local0.rank0.log"
    with pytest.raises(ValueError, match="expected a rank of the last world, 0 to 1"):
        job.task(2)


def test_functions_written_for_slurm_form_their_process_group_by_their_own_means_in_every_round(
    local: submitit.AutoExecutor, tmp_path: Path
) -> None:
    """With submitit's helper, with similar code, with an address and a port, and through a file, as if rank 0 hosted
    it.
    """

    def train(port: int) -> list[int]:
        import torch
        import torch.distributed as dist

        env, sums = submitit.JobEnvironment(), []
        here = {"rank": env.global_rank, "world_size": env.num_tasks}

        def add_up(**how: Any) -> None:
            dist.init_process_group("gloo", **how)
            total = torch.ones(1)
            dist.all_reduce(total)
            dist.destroy_process_group()
            sums.append(int(total))

        again = os.environ["ELASTIC_HPC_ROUND"] != "1"
        helper = submitit.helpers.TorchDistributedEnvironment().export(overwrite=again)
        assert (helper.rank, helper.world_size, helper.local_world_size) == (env.global_rank, env.num_tasks, 1)
        add_up()
        add_up(init_method=f"tcp://{env.hostnames[0]}:{port}", **here)
        add_up(init_method=(tmp_path / "init").as_uri(), **here)
        os.environ.update(MASTER_ADDR=env.hostnames[0], MASTER_PORT=str(port + 1), RANK=str(env.global_rank))
        add_up()
        if not again:
            if env.global_rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
        return sums

    local.update_parameters(nodes=2)
    job = local.submit(train, free_ports(2))
    end = time.monotonic() + 120
    while not job.done() and time.monotonic() < end:
        time.sleep(0.2)
    if not job.done():
        job.cancel()
    assert job.results() == [[2] * 4] * 2
    assert job.status.restarts == 1


def wait_for_round(job: Any) -> None:
    end = time.monotonic() + 60
    while not job.status.round:
        assert time.monotonic() < end
        time.sleep(0.1)


def free_ports(count: int) -> int:
    """The first of ``count`` consecutive free ports."""
    while True:
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            first = held.enter_context(socket.socket())
            first.bind(("", 0))
            port: int = first.getsockname()[1]
            for number in range(port + 1, port + count):
                held.enter_context(socket.socket()).bind(("", number))
            return port


def test_the_patched_parts_of_submitits_helper_and_of_torch_still_exist() -> None:
    """And the patches are still needed: the helper refuses torchrun's variables, and torch's workers never host their
    store.
    """
    rendezvous = importlib.import_module("torch.distributed.rendezvous")  # not the function

    helper = submitit.helpers.TorchDistributedEnvironment
    assert list(inspect.signature(helper.export).parameters) == ["self", "set_cuda_visible_devices", "overwrite"]
    assert "is already set" in inspect.getsource(helper.export)
    assert 'os.environ.get("MASTER_PORT")' in inspect.getsource(helper)
    assert list(inspect.signature(rendezvous._create_c10d_store).parameters)[:4] == [
        "hostname",
        "port",
        "rank",
        "world_size",
    ]
    assert "if _torchelastic_use_agent_store():" in inspect.getsource(rendezvous._create_c10d_store)
    assert "FileStore(path, world_size)" in inspect.getsource(rendezvous._file_rendezvous_handler)


def test_an_exception_comes_back_with_its_traceback_and_a_job_can_be_cancelled(local: submitit.AutoExecutor) -> None:
    def breaks() -> None:
        raise KeyError("no such thing")

    local.update_parameters(nodes=1, elastic_max_restarts=0)
    broken, slow = local.submit(breaks), local.submit(time.sleep, 600)
    assert isinstance(broken.exception(), utils.FailedJobError)
    assert "in breaks" in str(broken.exception())
    assert "KeyError: 'no such thing'" in str(broken.exception())
    wait_for_round(slow)
    slow.cancel()
    assert slow.exception() is not None
    assert slow.state == "CANCELLED"


def test_jobs_on_this_machine_ask_no_slurm_and_work_in_asyncio(
    local: submitit.AutoExecutor, sbatch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = sbatch / "asked"
    for command in ("squeue", "scancel", "scontrol"):
        (sbatch / "bin" / command).write_text(f"#!/bin/sh\necho {command} >> {asked}\n")
        (sbatch / "bin" / command).chmod(0o755)

    async def await_jobs() -> None:
        job, slow = local.submit(abs, -3), local.submit(time.sleep, 600)
        assert job.get_info() == {"JobID": job.job_id, "State": "RUNNING", "NodeList": ""}
        assert await job.awaitable().results() == [3]
        assert [await result for result in job.awaitable().results_as_completed()] == [3]
        await asyncio.to_thread(wait_for_round, slow)
        slow.cancel()
        await slow.awaitable().wait()
        for timeout in (False, True):
            with pytest.raises(ElasticError, match="has ended, CANCELLED"):
                slow._interrupt(timeout=timeout)
        assert [each.job_id for each in submitit.helpers.as_completed([job, slow])] == [job.job_id, slow.job_id]

    local.update_parameters(nodes=1)
    asyncio.run(await_jobs())
    assert not asked.exists()


def test_a_function_that_ends_its_process_has_no_result(
    local: submitit.AutoExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.update_parameters(nodes=1)
    job = local.submit(os._exit, 0)
    monkeypatch.setattr(type(job), "_results_timeout_s", 0)
    with pytest.raises(utils.UncompletedJobError, match="has not produced any output"):
        job.results()


def test_a_job_set_to_be_cancelled_with_its_object_is_also_cancelled_at_the_end_of_the_program(tmp_path: Path) -> None:
    script = tmp_path / "client.py"
    script.write_text("""
import submitit, time
executor = submitit.AutoExecutor("jobs/%j", cluster="elastic-local")
jobs = [executor.submit(time.sleep, 600).cancel_at_deletion() for _ in range(2)]
while not all(job.status.round for job in jobs):
    time.sleep(0.1)
del jobs[0]
""")
    subprocess.run([sys.executable, str(script)], cwd=tmp_path, check=True, timeout=120)
    end = time.monotonic() + 60
    jobs = [ElasticLocalJob(tmp_path / "jobs" / "%j", f"local.{number}") for number in range(2)]
    while not all(job.done() for job in jobs) and time.monotonic() < end:
        time.sleep(0.1)
    assert [job.state for job in jobs] == ["CANCELLED"] * 2
