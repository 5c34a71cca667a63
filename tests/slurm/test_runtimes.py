"""Elastic jobs in real containers: Slurm's own with an OCI bundle, charliecloud, podman. The image is made of
this machine's packages: a Python without Slurm's commands and without elastic_hpc, which comes from the mounted
checkout.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import COUNTS, ROOT, Cluster, Job, wait_for
from on_demand import ON_DEMAND

Submit = Callable[..., Job]
PACKAGES = ("python3", "bash", "coreutils", "dash", "libstdc++6")
LINKS = ("bin", "sbin", "lib", "lib64")
MOUNT_POINTS = ("dev", "proc", "sys", "tmp", "home", "root", "run/secrets", "var/run/slurm", "etc")
# Runtimes mount their own files on these; charliecloud needs the first two, podman all, as this image is read-only.
FILES = ("etc/passwd", "etc/group", "etc/hosts", "etc/hostname", "etc/resolv.conf", "run/.containerenv")

IN_CHARLIECLOUD = """\
#!/bin/sh
exec ch-run --bind "$HOME" --bind {root} --cd "$PWD" {image} -- {python} "$@"
"""
# The machines share folders that podman needs for each node alone, and crun 1.8 refuses mixed cgroup versions.
IN_PODMAN = """\
#!/bin/bash
export XDG_RUNTIME_DIR=/dev/shm/run
mkdir -p "$XDG_RUNTIME_DIR"
store="--root /dev/shm/podman --runroot /dev/shm/podman.run --storage-driver vfs --runtime runc"
podman() {{ command podman $store "$@"; }}
trap 'podman stop --time 20 "agent-$SLURM_JOB_ID"' TERM
podman run --rm --name "agent-$SLURM_JOB_ID" --network host --uts host --env-host \\
  -v /dev/shm:/dev/shm -v "$HOME:$HOME" -w "$PWD" -v {root}:{root} --rootfs {image} {python} "$@" &
wait $!
wait $!
"""
RUNTIMES = {
    "charliecloud": ("charliecloud-runtime", "ch-run", IN_CHARLIECLOUD),
    "podman": ("podman", "podman", IN_PODMAN),
}
"""The Debian package, its command, and the script that replaces Python, by runtime."""


def installed(package: str, command: str) -> None:
    """Install ``package`` if its ``command`` is missing. Skips the test if that fails."""
    if shutil.which(command):
        return
    install = ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=300", "install", "-y", "--no-install-recommends", package]
    try:
        done = subprocess.run(install, capture_output=True, text=True, timeout=600, check=False)
    except OSError as error:
        pytest.skip(f"{package} cannot be installed: {error}")
    if done.returncode:
        pytest.skip(f"{package} cannot be installed: {done.stderr.strip()[-300:]}")


@pytest.fixture(scope="module")
def image(cluster: Cluster) -> Iterator[Path]:
    """The root of a file system with Python and with mount points for this checkout and the home of the jobs' user."""
    root = cluster.state / "bundle/rootfs"
    for folder in (*(f"usr/{link}" for link in LINKS), *MOUNT_POINTS, str(ROOT)[1:], str(cluster.home)[1:]):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for link in LINKS:
        (root / link).symlink_to(f"usr/{link}")
    alternatives = [
        f"--no-{kind}" for kind in ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")
    ]
    needed = ["apt-cache", "depends", "--recurse", "--installed", *alternatives, *PACKAGES]
    packages = [line for line in output(needed).splitlines() if line[:1].isalnum()]
    for name in output(["dpkg-query", "--listfiles", *packages]).splitlines():
        target = root / name[1:]
        if os.path.isdir(name) or not os.path.lexists(name) or "/share/doc/" in name or os.path.lexists(target):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(name, target, follow_symlinks=False)
    python, library = os.path.realpath(sys.executable), os.path.dirname(os.__file__)
    if not (root / python[1:]).exists():  # under bin/trixie the interpreter belongs to another system
        shutil.copy2(python, root / python[1:])
        others = shutil.ignore_patterns("dist-packages", "test")
        shutil.copytree(library, root / library[1:], symlinks=True, ignore=others)
    for file in FILES:
        (root / file).touch()
    (root / "etc/mtab").symlink_to("/proc/mounts")
    yield root
    shutil.rmtree(root.parent)


def output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def bundle(image: Path, home: Path) -> Path:
    """``image`` as an OCI bundle whose container has its own users, processes and mounts, and its node's network."""
    folders = ["/dev", "/sys", "/tmp", "/etc/hosts", str(ROOT), str(home)]
    bind = [{"destination": path, "source": path, "type": "none", "options": ["rbind"]} for path in folders]
    as_root = [{"containerID": 0, "hostID": home.stat().st_uid, "size": 1}]
    config = {
        "ociVersion": "1.0.0",
        "process": {"user": {"uid": 0, "gid": 0}, "args": ["sh"], "cwd": "/", "env": ["PATH=/bin", "SAYS=image"]},
        "root": {"path": image.name, "readonly": True},
        "mounts": [{"destination": "/proc", "source": "proc", "type": "proc"}, *bind],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("user", "mount", "pid")],
            "uidMappings": as_root,
            "gidMappings": as_root,
        },
    }
    (image.parent / "config.json").write_text(json.dumps(config))
    return image.parent


def loses_a_node(submit: Submit, fresh: Cluster, folder: Path, image: Path, *options: str) -> None:
    """A job with ``options`` whose workers train in ``image``, and continue to the end when a node is lost."""
    (folder / "hold").touch()
    job = submit("--nodes", "2:3", "--env", "SAYS=job", *options, script=COUNTS)
    job.wait_steps(10)
    for node in "n1", "n2", "n3":
        (worker,) = fresh.running("counts.py", node)
        assert os.path.samefile(f"/proc/{worker}/root", image)
        assert b"SAYS=job" in Path(f"/proc/{worker}/environ").read_bytes().split(b"\0")
    fresh.mini("kill", "n3")
    job.wait_event("round", 2)
    (folder / "hold").unlink()
    job.wait_event("verdict")
    fresh.wait_noticed("n3")  # agents without Slurm's commands cannot remove the node from the job
    assert job.wait_state("COMPLETED", "FAILED") == "COMPLETED", job.output()
    job.assert_steps_contiguous(10)
    assert job.worlds() == [3, 2]
    assert job.verdict()["outcome"] == "finished"
    assert "Traceback" not in job.output()
    leaves_nothing(fresh)


def leaves_nothing(fresh: Cluster) -> None:
    """Agents and workers have ended on all nodes. podman keeps a process of its own for its next container."""
    for node in "n1", "n2", "n3", "n4":
        wait_for(
            f"{node} to have no agent and no worker",
            lambda node=node: not [argv for argv in fresh.in_jobs(node) if argv and "python" in argv[0]],
        )


def is_cancelled(submit: Submit, fresh: Cluster, folder: Path, *options: str) -> None:
    (folder / "hold").touch()
    job = submit("--nodes", "2", *options, script=COUNTS)
    job.wait_steps(10)
    fresh.exec(["scancel", job.id])
    assert job.wait_state("CANCELLED", "COMPLETED", "FAILED") == "CANCELLED", job.output()
    leaves_nothing(fresh)
    assert not job.events("restart")


def oci(fresh: Cluster, image: Path) -> list[str]:
    """The options of a job in ``image`` with Slurm's own --container."""
    installed("runc", "runc")
    made = bundle(image, fresh.home)
    return ["--container-image", str(made), "--container-runtime", "oci", "--python", sys.executable]


def in_script(folder: Path, image: Path, runtime: str) -> list[str]:
    """The options of a job whose Python is a script that runs ``image``."""
    package, command, script = RUNTIMES[runtime]
    installed(package, command)
    (folder / "in-container").write_text(script.format(root=ROOT, image=image, python=sys.executable))
    (folder / "in-container").chmod(0o755)
    return ["--python", "./in-container"]


@ON_DEMAND
def test_a_job_in_slurms_own_container_loses_a_node_and_completes(
    submit: Submit, fresh: Cluster, folder: Path, image: Path
) -> None:
    loses_a_node(submit, fresh, folder, image, *oci(fresh, image))


@ON_DEMAND
def test_a_cancelled_job_leaves_nothing_in_slurms_own_container(
    submit: Submit, fresh: Cluster, folder: Path, image: Path
) -> None:
    is_cancelled(submit, fresh, folder, *oci(fresh, image))


@ON_DEMAND
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_job_whose_python_is_in_a_container_loses_a_node_and_completes(
    submit: Submit, fresh: Cluster, folder: Path, image: Path, runtime: str
) -> None:
    loses_a_node(submit, fresh, folder, image, *in_script(folder, image, runtime))


@ON_DEMAND
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_cancelled_job_leaves_nothing_in_a_container_of_its_python(
    submit: Submit, fresh: Cluster, folder: Path, image: Path, runtime: str
) -> None:
    is_cancelled(submit, fresh, folder, *in_script(folder, image, runtime))
