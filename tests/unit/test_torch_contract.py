"""Assumptions of elastic_hpc about torch. A failure means that torch has changed: see workers.elastic_agent."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import socket
import subprocess
import sys

from torch.distributed import TCPStore
from torch.distributed.elastic.agent.server import api
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.rendezvous import RendezvousHandler

from elastic_hpc.agent.rendezvous import ElasticRendezvousHandler
from elastic_hpc.workers.aside import OF_A_ROUND


def source(of: object) -> str:
    return inspect.getsource(of)  # type: ignore[arg-type]


def test_the_extended_methods_exist_and_the_agent_calls_them() -> None:
    run = source(api.SimpleElasticAgent._invoke_run)
    assert "self._monitor_workers(" in run
    assert "rdzv_handler.num_nodes_waiting()" in run
    assert "self._restart_workers(" in run
    assert "self._stop_workers(" in source(api.SimpleElasticAgent._restart_workers)
    assert "self._start_workers(" in source(api.SimpleElasticAgent._initialize_workers)
    assert "self._shutdown()" in source(LocalElasticAgent._stop_workers)


def test_the_restart_count_of_workers_comes_from_the_remaining_restarts() -> None:
    start = source(LocalElasticAgent._start_workers)
    assert "restart_count = spec.max_restarts - self._remaining_restarts" in start
    assert '"TORCHELASTIC_RESTART_COUNT": str(restart_count)' in start


def test_identical_nodes_get_their_ranks_without_a_store() -> None:
    ranks = source(api.SimpleElasticAgent._assign_worker_ranks)
    fast_path, _, slow_path = ranks.partition("else:")
    assert "TORCH_ELASTIC_WORKER_IDENTICAL" in fast_path
    assert "store." not in fast_path.partition('"""')[2].partition('"""')[2]
    assert "store." in slow_path


def test_the_process_context_is_where_our_agent_looks_for_it() -> None:
    assert "self._pcontext = start_processes(" in source(LocalElasticAgent._start_workers)
    assert "if self._pcontext:" in source(LocalElasticAgent._shutdown)
    made = source(SubprocessContext.__init__) + source(SubprocessContext.__mro__[1].__init__)
    assert "self.error_files" in made
    assert "self.stderrs" in made


def test_every_worker_leads_a_session_of_its_own() -> None:
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    assert 'kwargs["start_new_session"] = True' in source(SubprocessHandler._popen)


def test_workers_are_created_where_a_standby_is_handed_over() -> None:
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    made = source(SubprocessContext._start)
    assert "get_subprocess_handler(\n" in made
    assert SubprocessContext._start.__globals__["get_subprocess_handler"].__name__ == "get_subprocess_handler"
    start = source(SubprocessHandler.__init__)
    assert "self.proc: Popen = self._popen(args_str, env_vars)" in start
    assert 'self._stdout = open(stdout, "w") if stdout else None' in start


def test_standbys_know_the_variables_that_torch_sets_for_a_worker() -> None:
    texts = [
        source(getattr(LocalElasticAgent, name))
        for name in dir(LocalElasticAgent)
        if name.endswith(("_env", "_workers"))
    ]
    told = set(re.findall(r'^ +"([A-Z_]+)": |worker_env\["([A-Z_]+)"\] = ', "\n".join(texts), re.MULTILINE))
    inherited = {"OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"}  # inherited from this agent, unless it sets another value
    assert {one or other for one, other in told} - inherited == {
        name
        for name in OF_A_ROUND
        if not name.startswith(("ELASTIC_HPC_", "GLOO_", "SUBMITIT_")) and not name.endswith("_FILE")
    }


def test_dollar_signs_in_arguments_survive_torchs_macros() -> None:
    from torch.distributed.elastic.utils import macros

    given = ["$HOME", "$$", "${local_rank}", "100%"]
    assert macros.substitute([word.replace("$", "$$") for word in given], "3") == given


def test_workers_do_not_prefix_the_agents_store_so_every_round_needs_its_own() -> None:
    rendezvous = importlib.import_module("torch.distributed.rendezvous")
    assert "PrefixStore" not in source(rendezvous._create_c10d_store)


def test_the_handler_implements_all_of_torchs_interface() -> None:
    assert not ElasticRendezvousHandler.__abstractmethods__
    assert {name for name, _ in inspect.getmembers(RendezvousHandler, inspect.isfunction)} <= set(
        dir(ElasticRendezvousHandler)
    )


def test_a_store_takes_over_a_listening_socket() -> None:
    with socket.create_server(("", 0)) as listener:
        port = listener.getsockname()[1]
        store = TCPStore(
            "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=os.dup(listener.fileno())
        )
    store.set("key", "value")
    assert TCPStore("127.0.0.1", port, is_master=False).get("key") == b"value"


def test_submitting_and_looking_import_no_torch() -> None:
    code = (
        "import sys, elastic_hpc.cli.sbatch, elastic_hpc.cli.srun, elastic_hpc.cli.hpc, elastic_hpc.membership.leader;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'submitit', 'numpy')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
