"""bin/mini-slurm itself: it does what the other tests of this directory rely on, and leaves nothing behind."""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from on_demand import ON_DEMAND

MINI = Path(__file__).parents[2] / "bin" / "mini-slurm"
NODES = ["n1", "n2", "n3", "n4"]
QUIET_S = 2.0  # how long to watch a connection before concluding that no reset came; on this network a reset takes 1 ms

LISTEN = "import socket; s = socket.create_server(('', 7000)); print('listening', flush=True); c, _ = s.accept(); "
ECHO = LISTEN + "[c.sendall(c.recv(64)) for _ in iter(int, 1)]"
TALK = """
import socket, sys
connection = socket.create_connection((sys.argv[1], 7000))
connection.settimeout(float(sys.argv[2]))
for line in sys.stdin:
    try:
        connection.sendall(line.encode())
        print("answer" if connection.recv(64) else "closed", flush=True)
    except TimeoutError:
        print("silence", flush=True)
    except OSError as error:
        print(type(error).__name__, flush=True)
"""


def copied(folder: Path) -> Path:
    """A copy of the command and its package in another folder."""
    shutil.copytree(MINI.with_name("mini_slurm"), folder / "mini_slurm")
    return Path(shutil.copy(MINI, folder))


def eventually(what: str, holds: Callable[[], Any], within_s: float = 30.0) -> Any:
    deadline = time.monotonic() + within_s
    while not (value := holds()):
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        time.sleep(0.02)
    return value


def status(cluster: Any) -> dict[str, Any]:
    return json.loads(cluster.mini("status", "--json").stdout)


@contextmanager
def connected(server: str, client: str, *, answer_within_s: float) -> Iterator[Callable[[], str]]:
    """A TCP connection from `client` to an echo server on `server`; yields a function that returns the fate of the
    connection.
    """

    def start(node: str, *argv: str) -> subprocess.Popen[str]:
        command = [str(MINI), "exec", "--node", node, "--", "/usr/bin/python3", "-c", *argv]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def ask() -> str:
        assert talker.stdin
        assert talker.stdout
        print("hello", file=talker.stdin, flush=True)
        return talker.stdout.readline().strip()

    with start(server, ECHO) as echo:
        assert echo.stdout
        assert echo.stdout.readline() == "listening\n"
        with start(client, TALK, server, str(answer_within_s)) as talker:
            try:
                assert ask() == "answer"
                yield ask
            finally:
                talker.kill()
                echo.kill()


class TestRunningCluster:
    def test_all_nodes_are_idle_in_all_partitions(self, cluster: Any) -> None:
        assert {facts["slurm"] for facts in status(cluster)["nodes"].values()} == {"IDLE"}
        sinfo = ["sinfo", "-h", "-o", "%P %l %D"]
        partitions = cluster.mini("exec", "--root", "--", *sinfo).stdout.splitlines()  # a site hides nodes from users
        preemption = ["low infinite 4", "lowcancel infinite 4", "high infinite 4"]
        assert partitions == ["main* infinite 4", "short 2:00 4", *preemption]

    def test_a_job_runs_as_the_unprivileged_user_on_all_nodes(self, cluster: Any) -> None:
        done = cluster.exec(["srun", "-N4", "sh", "-c", 'echo "$(hostname) $(id -un) $HOME"'])
        home = status(cluster)["home"]
        assert sorted(done.stdout.splitlines()) == [f"{node} minislurm {home}" for node in NODES]

    def test_a_batch_job_writes_into_the_home_that_all_nodes_share(self, cluster: Any) -> None:
        script = "cd; sbatch --wait -N4 --wrap 'srun sh -c \"touch seen-by-\\$(hostname)\"'; ls; rm seen-by-*"
        done = cluster.exec(["bash", "-c", script])
        assert [line for line in done.stdout.splitlines() if line.startswith("seen")] == [f"seen-by-{n}" for n in NODES]

    def test_a_job_that_inherits_nothing_from_its_submitter_has_the_environment_of_a_login(self, cluster: Any) -> None:
        script = (
            "cd; sbatch --wait --export=NONE -o login.out --wrap 'echo $LOGNAME $HOME'; cat login.out; rm login.out"
        )
        done = cluster.exec(["bash", "-c", script])
        assert done.stdout.splitlines()[-1] == f"minislurm {status(cluster)['home']}"

    def test_two_jobs_share_a_node(self, cluster: Any) -> None:
        both = "srun -w n1 -n1 sh -c 'srun --version; squeue -h -t R -o \"%j on %N\"'"
        cluster.exec(["sbatch", "-J", "first", "-w", "n1", "-n1", "-o", "/dev/null", "--wrap", "sleep 60"])
        eventually("first runs", lambda: "first" in cluster.exec(["squeue", "-h", "-t", "R", "-o", "%j"]).stdout)
        try:
            assert "first on n1" in cluster.exec(["bash", "-c", both]).stdout
        finally:
            cluster.exec(["scancel", "-n", "first"])
        eventually("the queue is empty", lambda: not cluster.exec(["squeue", "-h"]).stdout)

    @pytest.mark.parametrize("option", ["--gpus-per-node=2", "--gres=gpu:2"])
    def test_gpus_are_granted(self, cluster: Any, option: str) -> None:
        done = cluster.exec(["srun", "-N2", option, "sh", "-c", "echo $CUDA_VISIBLE_DEVICES $SLURM_GPUS_ON_NODE"])
        assert done.stdout.splitlines() == ["0,1 2"] * 2

    def test_more_gpus_than_a_node_has_are_refused(self, cluster: Any) -> None:
        assert cluster.exec(["srun", "--gres=gpu:3", "true"], check=False).returncode != 0

    @pytest.mark.parametrize("name", ["n3", "n3.mini.cluster", "n3-ib0", "n3-ib0.mini.cluster"])
    def test_names_resolve_in_both_directions_and_with_a_domain(self, cluster: Any, name: str) -> None:
        code = (
            "import socket, sys; ip = socket.gethostbyname(sys.argv[1]); print(ip);"
            "print(*(socket.getnameinfo((form, 0), socket.NI_NAMEREQD)[0] for form in (ip, '::ffff:' + ip)))"
        )
        address, names = cluster.exec(["/usr/bin/python3", "-c", code, name], node="n1").stdout.splitlines()
        assert ipaddress.ip_address(address) in ipaddress.ip_network(
            "10.214.0.0/24" if "ib0" in name else "10.213.0.0/24"
        )
        assert set(names.split()) == {name.partition(".")[0]}

    def test_each_node_sees_only_its_own_two_interfaces(self, cluster: Any) -> None:
        script = "ls /sys/class/net; cut -d: -f1 -s /proc/net/dev"
        words = cluster.exec(["sh", "-c", script], node="n2").stdout.split()
        assert sorted(words) == ["eth0", "eth0", "ib0", "ib0", "lo", "lo"]

    def test_the_lifetime_of_credentials_that_delays_a_requeue_is_slurms_default(self, cluster: Any) -> None:
        assert "cred_expire" not in cluster.exec(["scontrol", "show", "config"]).stdout

    def test_exec_passes_exit_code_stdio_signals_and_variables(self, cluster: Any) -> None:
        assert cluster.exec(["sh", "-c", "exit 7"], check=False).returncode == 7
        assert cluster.exec(["sh", "-c", "kill -KILL $$"], check=False).returncode == -signal.SIGKILL
        assert cluster.exec(["/no/such/command"], check=False).returncode == 127
        assert cluster.mini("exec", "--env", "A=b c", "--", "sh", "-c", "echo $A").stdout == "b c\n"
        trap = "trap 'echo got it; exit 3' TERM; echo ready; while :; do sleep 0.05; done"
        with subprocess.Popen([MINI, "exec", "sh", "-c", trap], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
            process.terminate()
            try:
                assert process.communicate(timeout=10)[0] == "got it\n"
                assert process.returncode == 3
            finally:
                process.kill()

    def test_a_command_ends_with_the_exec_that_started_it(self, cluster: Any) -> None:
        with subprocess.Popen([MINI, "exec", "--node", "n1", "--", "sleep", "4321"]) as process:
            eventually("it runs", lambda: cluster.exec(["pgrep", "-f", "sleep 4321"], "n1", check=False).stdout)
            process.kill()
        eventually("it is gone", lambda: not cluster.exec(["pgrep", "-f", "sleep 4321"], "n1", check=False).stdout)

    def test_an_unknown_node_is_refused_with_the_names_of_existing_nodes(self, cluster: Any) -> None:
        done = cluster.mini("kill", "n9", check=False)
        assert done.returncode == 1
        assert done.stderr == "mini-slurm: error: no node 'n9': expected one of n1 n2 n3 n4\n"

    def test_without_root_it_says_what_to_type(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            os.chmod(directory, 0o755)
            copy = str(copied(Path(directory)))
            nobody: Any = {"user": 65534, "group": 65534, "extra_groups": []}
            done = subprocess.run([copy, "up"], **nobody, cwd="/", capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (2, f"mini-slurm: needs root: type  sudo {copy} up\n")


@pytest.mark.usefixtures("fresh")
class TestFaults:
    def test_a_killed_node_sends_no_reset_and_can_be_healed(self, cluster: Any) -> None:
        with connected("n3", "n2", answer_within_s=QUIET_S) as ask:
            before, printed = time.time(), cluster.mini("kill", "n3").stdout
            assert before <= float(printed.split()[0]) <= time.time()
            assert ask() == "silence"
        facts = status(cluster)["nodes"]["n3"]
        assert (facts["power"], facts["links"], facts["slurmd"]) == (False, False, False)
        assert cluster.exec(["true"], node="n3", check=False).returncode == 125
        cluster.mini("heal", "n3")
        assert cluster.exec(["srun", "-w", "n3", "hostname"]).stdout == "n3\n"

    def test_without_power_loss_a_dying_process_does_send_a_reset(self, cluster: Any) -> None:
        """The previous test relies on this: the same connection gets a reset when only the peer's processes end."""
        with connected("n3", "n2", answer_within_s=QUIET_S) as ask:
            cluster.mini("exec", "--root", "--node", "n3", "--", "pkill", "-KILL", "-f", "create_server")
            assert ask() in {"closed", "ConnectionResetError", "BrokenPipeError"}

    def test_every_process_of_a_killed_node_is_gone_when_kill_returns(self, cluster: Any) -> None:
        init = status(cluster)["nodes"]["n3"]["init_pid"]
        namespace = os.readlink(f"/proc/{init}/ns/pid")
        with subprocess.Popen([MINI, "exec", "--node", "n3", "--", "setsid", "--fork", "sleep", "600"]) as process:
            process.wait(10)
        assert len(processes_in(namespace)) >= 3
        cluster.mini("kill", "n3")
        assert processes_in(namespace) == []

    def test_a_cut_node_keeps_its_processes_and_connections(self, cluster: Any) -> None:
        init = status(cluster)["nodes"]["n2"]["init_pid"]
        with connected("n2", "n3", answer_within_s=QUIET_S) as ask:
            cluster.mini("cut", "n2")
            assert ask() == "silence"
            facts = status(cluster)["nodes"]["n2"]
            assert (facts["power"], facts["links"], facts["slurmd"]) == (True, False, True)
            cluster.mini("heal", "n2")
            eventually("the old connection speaks again", lambda: ask() == "answer")
        assert status(cluster)["nodes"]["n2"]["init_pid"] == init

    @ON_DEMAND
    @pytest.mark.parametrize("fault", ["kill", "cut"])
    def test_a_node_that_slurm_set_down_under_a_job_can_be_healed(self, cluster: Any, fault: str) -> None:
        script = "cd; sbatch -w n[3-4] --no-kill -o /dev/null --wrap 'srun --no-kill --wait=0 sleep 300'"
        cluster.exec(["bash", "-c", script])
        running = ["squeue", "-h", "-o", "%T %N"]
        eventually("the job runs", lambda: cluster.exec(running).stdout == "RUNNING n[3-4]\n")
        cluster.mini(fault, "n4")
        cluster.wait_noticed("n4")
        assert cluster.exec(running).stdout == "RUNNING n3\n"
        cluster.exec(["scancel", "-u", "minislurm"])
        cluster.mini("heal", "n4")
        assert cluster.exec(["srun", "-w", "n4", "hostname"]).stdout == "n4\n"
        eventually("the queue is empty", lambda: not cluster.exec(["squeue", "-h"]).stdout, within_s=60)


def processes_in(namespace: str) -> list[str]:
    def is_in(pid: str) -> bool:
        try:
            return os.readlink(f"/proc/{pid}/ns/pid") == namespace
        except OSError:
            return False

    return [entry for entry in os.listdir("/proc") if entry.isdecimal() and is_in(entry)]


class Apart:
    """A small cluster in a directory of its own, next to the cluster of the session."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.state = directory, directory / "state"

    def start(self, *args: str, program: Path = MINI) -> subprocess.Popen[str]:
        # The state directory on the command line makes every process of this cluster recognisable.
        command = [str(program), "--state", str(self.state), *args]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def mini(self, *args: str, check: bool = True, program: Path = MINI) -> subprocess.CompletedProcess[str]:
        with self.start(*args, program=program) as process:
            out, err = process.communicate(timeout=120)
        assert process.returncode == 0 or not check, err
        return subprocess.CompletedProcess(args, process.returncode, out, err)

    def processes(self) -> list[str]:
        def mentions(entry: Path) -> bool:
            try:
                return str(self.state).encode() in (entry / "cmdline").read_bytes()
            except OSError:
                return False

        return [entry.name for entry in Path("/proc").iterdir() if entry.name.isdecimal() and mentions(entry)]

    def assert_nothing_left(self, before: tuple[object, ...]) -> None:
        eventually("all processes are gone", lambda: not self.processes(), within_s=10)
        assert list(self.directory.iterdir()) == []
        assert machine() == before


def machine() -> tuple[object, ...]:
    """The state of the machine itself that a cluster could change."""
    links = {name for _, name in socket.if_nameindex()}
    mounts = Path("/proc/self/mounts").read_text()
    return links, mounts, Path("/etc/passwd").read_text(), Path("/etc/hosts").read_text(), os.listdir("/etc")


@pytest.fixture
def apart() -> Iterator[Apart]:
    directory = Path(tempfile.mkdtemp(prefix="mini-"))  # closed to others (0700), its path is short enough for sockets
    made = Apart(directory)
    yield made
    made.mini("down")
    shutil.rmtree(directory)


class TestLifeCycle:
    def test_a_second_up_is_harmless_and_another_shape_is_refused(self, apart: Apart) -> None:
        apart.mini("up", "--nodes", "1")
        inits = apart.mini("status", "--json").stdout
        assert "already up" in apart.mini("up", "--nodes", "1").stderr
        refused = apart.mini("up", "--nodes", "2", check=False)
        assert refused.returncode == 1
        assert "mini-slurm down" in refused.stderr
        assert apart.mini("status", "--json").stdout == inits

    def test_two_ups_at_once_make_one_cluster(self, apart: Apart) -> None:
        with apart.start("up", "--nodes", "1") as first, apart.start("up", "--nodes", "1") as second:
            answers = sorted([up.communicate(timeout=60)[1] for up in (first, second)])
        assert (first.returncode, second.returncode) == (0, 0)
        assert sum("already up" in answer for answer in answers) == 1
        assert len([name for name in os.listdir(apart.state / "machines") if name.startswith("n")]) == 1

    def test_a_second_down_is_harmless_and_leaves_nothing(self, apart: Apart) -> None:
        before = machine()
        apart.mini("up", "--nodes", "2")
        assert machine() == before
        assert apart.mini("status").returncode == 0
        assert apart.processes()
        apart.mini("down")
        apart.assert_nothing_left(before)
        assert "nothing to remove" in apart.mini("down").stderr
        assert apart.mini("status", check=False).returncode == 3

    @pytest.mark.parametrize("reached", ["state.json", "etc", "machines/rack", "machines/login", "machines/n2"])
    def test_down_after_a_crashed_up_leaves_nothing(self, apart: Apart, reached: str) -> None:
        before = machine()
        with apart.start("up", "--nodes", "4") as process:
            while not (apart.state / reached).exists() and process.poll() is None:
                pass
            process.kill()
        apart.mini("down")
        apart.assert_nothing_left(before)

    def test_up_after_a_crashed_up_starts_from_scratch(self, apart: Apart) -> None:
        with apart.start("up", "--nodes", "4") as process:
            while not (apart.state / "machines/n1").exists() and process.poll() is None:
                pass
            process.kill()
        apart.mini("up", "--nodes", "1")
        assert apart.mini("exec", "srun", "hostname").stdout == "n1\n"

    def test_a_failing_up_shows_the_log_and_leaves_nothing(self, apart: Apart) -> None:
        before = machine()
        (apart.directory / "broken").mkdir()
        program = copied(apart.directory / "broken")
        source = program.with_name("mini_slurm") / "files.py"
        source.write_text(source.read_text().replace("SlurmctldHost=login", "SlurmctldHost=login\nNoSuchSetting=1"))
        failed = apart.mini("up", check=False, program=program)
        shutil.rmtree(program.parent)
        assert failed.returncode == 1
        assert "NoSuchSetting" in failed.stderr
        apart.assert_nothing_left(before)

    def test_a_state_directory_removed_by_hand_ends_the_cluster(self, apart: Apart) -> None:
        apart.mini("up", "--nodes", "1")
        shutil.rmtree(apart.state)
        eventually("its processes end", lambda: not apart.processes(), within_s=10)

    def test_down_spares_a_process_that_reuses_a_recorded_pid(self, apart: Apart) -> None:
        apart.mini("up", "--nodes", "1")
        with subprocess.Popen(["/usr/bin/unshare", "--pid", "--fork", "sleep", "600"]) as bystander:
            child = eventually(
                "it forks", lambda: Path(f"/proc/{bystander.pid}/task/{bystander.pid}/children").read_text().split()
            )[0]
            record = apart.state / "machines" / "n1"
            _, start, boot = record.read_text().split()
            record.write_text(f"{child} {start} {boot}")
            assert apart.mini("kill", "n1", check=False).returncode == 1
            apart.mini("down")
            assert bystander.poll() is None
            os.kill(int(child), signal.SIGKILL)

    def test_a_foreign_directory_is_not_touched(self, apart: Apart) -> None:
        apart.state.mkdir()
        (apart.state / "thesis.tex").write_text("ten years of work")
        assert apart.mini("down", check=False).returncode == 1
        assert apart.mini("up", check=False).returncode == 1
        assert (apart.state / "thesis.tex").read_text() == "ten years of work"
        shutil.rmtree(apart.state)

    def test_a_checkout_below_a_closed_directory_is_seen_at_its_path(self, apart: Apart) -> None:
        checkout = apart.directory / "checkout"
        (checkout / "bin").mkdir(parents=True)
        program = copied(checkout / "bin")
        (checkout / "marker").write_text("seen\n")
        (apart.directory / "secret").write_text("no\n")
        apart.mini("up", "--nodes", "1", program=program)
        for command in (["cat"], ["srun", "cat"]):
            assert apart.mini("exec", *command, str(checkout / "marker")).stdout == "seen\n"
        assert apart.mini("exec", "cat", str(apart.directory / "secret"), check=False).returncode != 0
        assert os.stat(apart.directory).st_mode & 0o077 == 0

    def test_a_slurm_under_another_prefix_is_used_also_by_jobs_and_after_a_power_loss(self, apart: Apart) -> None:
        prefix = apart.directory / "opt"
        for name in ("bin/sbatch", "bin/scontrol", "bin/squeue", "bin/srun", "sbin/slurmctld", "sbin/slurmd"):
            (prefix / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(f"/usr/{name}", prefix / name)
        prefix.chmod(0o755)
        apart.mini("--slurm", str(prefix), "up", "--nodes", "2")
        apart.mini("kill", "n2")
        apart.mini("heal", "n2")
        daemons = (path for name in ("slurmctld", "slurmd") for path in apart.state.glob(f"run/{name}-*.pid"))
        for path in daemons:
            init = (apart.state / "machines" / path.stem.partition("-")[2]).read_text().split()[0]
            exe = Path(f"/proc/{init}/root/proc/{path.read_text().strip()}/exe")
            assert os.readlink(exe) == str(prefix / "sbin" / path.stem.partition("-")[0])
        for options in ([], ["--export=NONE"]):
            found = apart.mini("exec", "srun", *options, "-N2", "/bin/bash", "-lc", "command -v srun").stdout
            assert found == f"{prefix}/bin/srun\n" * 2
        refused = apart.mini("--slurm", "/nope", "up", check=False)
        assert "sbin/slurmctld is not there" in refused.stderr

    def test_slurm_offers_the_shape_that_the_user_chose(self, apart: Apart) -> None:
        apart.mini("up", "--nodes", "2", "--cpus-per-node", "3", "--gpus-per-node", "0")
        assert apart.mini("exec", "sinfo", "-h", "-p", "main", "-o", "%D %c %G").stdout == "2 3 (null)\n"
        assert apart.mini("exec", "srun", "-n6", "hostname").stdout.split().count("n2") == 3
