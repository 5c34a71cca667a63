"""Which addresses a node publishes and listens on, and which host names it recognizes as its own."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_hpc.agent.first import leads_at_first
from elastic_hpc.errors import ElasticError
from elastic_hpc.membership.roster import Host, distinct
from elastic_hpc.network import addresses
from elastic_hpc.options.values import Endpoint
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.slurm.env import read_agent_env

BRIDGES = {"docker0": "172.17.0.1", "virbr0": "192.168.122.1", "cni-podman0": "10.88.0.1", "usb0": "169.254.3.1"}


class Machine:
    """The interfaces of a node as the system shows them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self.own = [("lo", "127.0.0.1")]
        self.names: dict[str, list[str]] = {}
        monkeypatch.setattr(addresses, "_SYSTEM", str(folder))
        monkeypatch.setattr(addresses, "_own", lambda: self.own)
        monkeypatch.setattr(addresses, "resolve", lambda name: self.names.get(name, []))
        self.add("lo")

    def add(self, name: str, *own: str, kind: str = "", over: str = "") -> Machine:
        """``kind``: ``device``, ``bridge`` or ``veth``. ``over``: the interface below."""
        (self._folder / name / kind).mkdir(parents=True)
        (self._folder / name / "ifindex").write_text("2\n")
        (self._folder / name / "iflink").write_text("7\n" if kind == "veth" else "2\n")
        if over:
            (self._folder / name / f"lower_{over}").touch()
        self.own += [(name, address) for address in own]
        return self

    def published(self, node: str = "n1") -> tuple[str, ...]:
        return addresses.to_publish(node, None, None)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def with_bridges(machine: Machine) -> Machine:
    machine.add("veth1a2b", kind="veth")  # the outer end of a container's
    for name, address in BRIDGES.items():
        machine.add(name, address, kind="device" if name == "usb0" else "bridge", over="veth1a2b")
    return machine.add("tap0", "10.0.2.100").add("kube-ipvs0", "10.96.0.1", "10.96.0.10")


@pytest.mark.parametrize("names", [[], ["10.1.0.7"], ["172.17.0.1", "10.1.0.7", "169.254.3.1"], ["127.0.1.1"]])
def test_an_address_that_every_node_has_is_not_published(machine: Machine, names: list[str]) -> None:
    machine.names["n1"] = names
    with_bridges(machine).add("eth0", "10.1.0.7", kind="device").add("ib0", "10.2.0.7", kind="device")
    assert machine.published() == ("10.1.0.7", "10.2.0.7")


def test_the_address_of_a_bond_a_vlan_or_a_bridge_over_a_device_is_published(machine: Machine) -> None:
    machine.add("eth0", kind="device").add("bond0", over="eth0").add("bond0.7", "10.1.0.7", over="bond0")
    machine.add("eth1", kind="device").add("br0", "10.2.0.7", kind="bridge", over="eth1")
    assert with_bridges(machine).published() == ("10.1.0.7", "10.2.0.7")


def test_both_networks_of_a_container_are_published(machine: Machine) -> None:
    machine.names["n1"] = ["10.1.0.7"]
    machine.add("eth0", "10.1.0.7", kind="veth").add("ib0", "10.2.0.7", kind="veth").add("tun0", "10.8.0.1")
    assert machine.published() == ("10.1.0.7", "10.2.0.7")


def test_the_address_of_a_nodes_name_is_published_whatever_its_interface_is(machine: Machine) -> None:
    """That of a container's veth, of a bridge of Open vSwitch, of a node that announces its address itself."""
    machine.names["n1"] = ["10.1.0.8"]
    with_bridges(machine).add("br-ex", "10.1.0.7", "10.1.0.8")
    assert machine.published() == ("10.1.0.8",)
    machine.names["n1"] = ["10.3.0.1"]
    machine.own.append(("lo", "10.3.0.1"))
    assert machine.published() == ("10.3.0.1",)


def test_without_a_better_address_any_is_published_but_loopback(machine: Machine) -> None:
    with pytest.raises(ElasticError, match="no network address but loopback"):
        machine.published()
    machine.add("usb0", "169.254.3.1", kind="device").add("docker0", "172.17.0.1", kind="bridge")
    machine.names["n1"] = ["172.17.0.1"]
    assert machine.published() == ("172.17.0.1", "169.254.3.1")
    machine.add("eth0", "10.1.0.7")  # a container's
    assert machine.published() == ("10.1.0.7",)


def test_a_bridge_for_containers_is_recognized_on_a_real_network(tmp_path: Path) -> None:
    if (
        not shutil.which("ip")
        or subprocess.run(["unshare", "-rn", "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("no network namespace can be made")
    script = tmp_path / "script.sh"
    script.write_text(
        "set -e\nmount -t sysfs sysfs /sys\nip link set lo up\n"
        "ip link add docker0 type bridge; ip addr add 172.17.0.1/16 dev docker0; ip link set docker0 up\n"
        "ip link add v0 type veth peer name v1; ip addr add 10.9.0.1/24 dev v0; ip addr add 10.9.0.2/24 dev v0\n"
        "ip link set v0 up; ip link set v1 up\n"
        "ip link add v2 type veth peer name v3; ip addr add 10.9.1.1/24 dev v2\n"
        'exec "$0" -c "from elastic_hpc.network import addresses as a; print(a.to_publish(\'10.9.0.2\', None, None), '
        "a.to_publish('no-such-host.invalid', None, None), a.to_publish('n', 'docker0', None), a.own(['10.9.0.2']), "
        "a.is_me('10.9.0.2', 'n'), a.own(['10.9.0.2', '10.9.9.9', '127.0.0.1']))\"\n"
    )
    done = subprocess.run(
        ["unshare", "-rmn", "sh", "-c", script.read_text(), sys.executable], check=True, capture_output=True, text=True
    )
    assert done.stdout.split(") (") == [
        "('10.9.0.2',",
        "'10.9.0.1',",
        "'172.17.0.1',) ['10.9.0.2'] True ['10.9.0.2', '127.0.0.1']\n",
    ]


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST.", "localhost.localdomain", "localhost6", "ip6-loopback", "a.localhost", "127.0.0.1",
     "127.0.1.1", "::1", "0.0.0.0", "::"],
)  # fmt: skip
def test_names_and_addresses_of_the_machine_itself(host: str) -> None:
    endpoint = Endpoint.parse(f"[{host}]:29400" if ":" in host else f"{host}:29400")
    assert endpoint.is_loopback
    assert endpoint.head is None


@pytest.mark.parametrize("host", [None, "", "n1", "local", "10.0.0.1", "localhost2", "fe80::1", "n1.localdomain"])
def test_names_and_addresses_of_one_machine(host: str | None) -> None:
    endpoint = Endpoint(host)
    assert not endpoint.is_loopback
    assert endpoint.head == host


def test_an_agent_listens_on_one_port_of_each_published_address_and_nowhere_else() -> None:
    with socket.create_server(("127.0.0.3", 43100)):
        made = addresses.listen_on(["127.0.0.2", "127.0.0.3"], 43100)
    try:
        port = made[0].getsockname()[1]
        assert [one.getsockname() for one in made] == [("127.0.0.2", port), ("127.0.0.3", port)]
        assert port > 43100
        socket.create_connection(("127.0.0.2", port)).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
    finally:
        for one in made:
            one.close()
    with pytest.raises(ElasticError, match=r"203\.0\.113\.9 is no longer an address of this node"):
        addresses.listen_on(["203.0.113.9"], 43100)


def leaders(rundir: RunDir, endpoint: str, *, nodes: int = 3, **environ: str) -> list[int]:
    """The nodes of a job step that lead at the start."""
    envs = [
        read_agent_env({**STEP, **environ, "SLURM_NODEID": str(n), "SLURMD_NODENAME": f"n{n}"}) for n in range(nodes)
    ]
    found = Endpoint.parse(endpoint)
    return [env.node for env in envs if leads_at_first(found, env, rundir, {**STEP, **environ})]


STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_NUM_TASKS": "3"}


@pytest.mark.parametrize(
    "endpoint", [":29400", "localhost:29400", "127.0.0.1", "[::1]:29400", "0.0.0.0:29400", "localhost.localdomain"]
)
def test_the_first_node_leads_where_the_endpoint_means_the_machine_itself_on_every_node(
    machine: Machine, endpoint: str
) -> None:
    machine.names |= {"localhost": ["127.0.0.1"], "localhost.localdomain": ["127.0.0.1"]}
    for nodes in (1, 3):
        assert leaders(RunDir("/none"), endpoint, nodes=nodes) == [0]


@pytest.mark.parametrize("endpoint", ["head.site", "10.1.0.9", socket.gethostname()])
def test_only_one_node_leads_where_several_have_the_endpoints_name_or_address(
    machine: Machine, tmp_path: Path, endpoint: str
) -> None:
    """For example an address that moves between nodes, or a name in the hosts file of a common image."""
    rundir = RunDir(tmp_path / "run").create()
    machine.add("eth0", "10.1.0.9")
    machine.names |= {"head.site": ["127.0.1.1"], "10.1.0.9": ["10.1.0.9"]}
    for environ in ({}, {"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "1"}, {"SLURM_JOB_ID": "8"}):
        assert leaders(rundir, endpoint, **environ) == [0]
    assert leaders(rundir, endpoint, SLURM_STEP_ID="2", ELASTIC_HPC_AGAIN="0") == []


def test_the_node_that_the_endpoint_names_leads(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path / "run").create()
    assert leaders(rundir, "n2:29400") == [2]
    assert leaders(rundir, "elsewhere.invalid") == []


def test_an_address_that_several_hosts_share_is_in_no_roster_unless_a_host_has_no_other() -> None:
    bridge, rshim = "172.17.0.1", "192.168.100.1"
    hosts = [Host(n, f"n{n}", (bridge, f"10.0.0.{n}", rshim), 1, "torch 2") for n in range(3)]
    assert [host.addresses for host in distinct(hosts)] == [("10.0.0.0",), ("10.0.0.1",), ("10.0.0.2",)]
    assert [host.software for host in distinct(hosts)] == ["torch 2"] * 3
    lone = Host(3, "n3", (bridge,), 1)
    assert distinct([*hosts, lone])[-1] == lone
    local = [Host(n, f"local{n}", ("127.0.0.1",), n) for n in range(2)]
    assert distinct(local) == tuple(local)
    assert distinct([]) == ()


@pytest.mark.parametrize(("endpoint", "first"), [("n2", [2]), (socket.gethostname(), [0])])
def test_one_node_leads_even_if_the_run_directory_cannot_be_written(endpoint: str, first: list[int]) -> None:
    assert leaders(RunDir("/proc/none"), endpoint) == first
