"""torch's ``RendezvousHandler`` on top of the control connection: where torch's agent meets the leader of the job."""

from __future__ import annotations

import os

from torch.distributed import HashStore
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from elastic_hpc.agent.assembly import Assembly
from elastic_hpc.agent.bridge import Seat
from elastic_hpc.environment import FENCE
from elastic_hpc.membership.messages import Plan
from elastic_hpc.network import addresses
from elastic_hpc.training.progress import LOCAL_DIR
from elastic_hpc.workers import folder
from elastic_hpc.workers.ahead import Ahead


class ElasticRendezvousHandler(RendezvousHandler):
    """Gives torch's agent the place that the leader has decided on. No method uses a store, or waits for lost nodes."""

    def __init__(self, parts: Assembly, ahead: Ahead | None = None) -> None:
        self._control, self._parts, self._ahead = parts.control, parts, ahead
        self._run_id = str(parts.spec.rdzv_id)
        self._gloo_interface = parts.environ.get("GLOO_SOCKET_IFNAME")
        self._local_folder = parts.local_folder
        self.seat: Seat | None = None
        """This node's place in the current round."""
        self.restart_wanted = False
        """Set when the workers of the current round must stop; torch's agent reads it through ``num_nodes_waiting``."""

    @property
    def round(self) -> int:
        """The current round; 0 before the first."""
        return self.seat.round if self.seat else 0

    @property
    def run(self) -> int:
        """The number of this run of the job."""
        return self._parts.env.run

    @property
    def plan(self) -> Plan:
        """The plan of the current round."""
        assert self.seat is not None
        return self.seat.plan

    def get_backend(self) -> str:
        return "c10d"

    @property
    def use_agent_store(self) -> bool:
        """The leader hosts the store; torch's workers only connect."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for the next round. Raises JobEnded, which passes through torch's agent."""
        seat = self.seat = self._wait_for_seat()
        self.restart_wanted = False
        folder.renew()
        os.environ["ELASTIC_HPC_ROUND"] = str(seat.round)
        os.environ[LOCAL_DIR] = os.path.join(self._local_folder, str(seat.round))
        os.mkdir(os.environ[LOCAL_DIR], 0o700)
        os.environ["ELASTIC_HPC_RANK0_ADDR"] = seat.plan.rank0_addr
        os.environ[FENCE] = f"{self._parts.identity}.{self.run}.{seat.round}"
        interface = self._gloo_interface or addresses.interface_of(seat.local_addr)
        if interface:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
        return RendezvousInfo(
            HashStore(),  # torch's agent requires a store; with TORCH_ELASTIC_WORKER_IDENTICAL it does not use it
            seat.plan.group_rank,
            seat.plan.group_world_size,
            RendezvousStoreInfo(seat.leader_addr, seat.plan.store_port),
        )

    def _wait_for_seat(self) -> Seat:
        try:
            return self._control.next_seat(self._ahead)
        finally:
            if self._ahead:
                self._ahead.end()

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Only the leader ends a job: a local failure must not end it for all nodes."""

    def num_nodes_waiting(self) -> int:
        """1 when the workers must be restarted: torch's public hook for membership changes."""
        return int(self.restart_wanted)

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True
