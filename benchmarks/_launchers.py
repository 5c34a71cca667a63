"""The launchers that are compared, and how elastic-sbatch submits a job that runs under another one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from _cluster import Cluster
from _report import ROOT, BenchmarkError

LIVE = "elastic-live"
OURS, TORCHRUN, OWN_STORE, FT = "elastic", "torchrun", "torchrun-own-store", "ft_launcher"
AGENT, TORCHRUN_MODULE, FT_MODULE = (
    "elastic_hpc.agent",
    "torch.distributed.run",
    "nvidia_resiliency_ext.fault_tolerance.launcher",
)
"""Modules that run on each node, and appear as a word of the command line there."""
OWN_STORE_OPTION = "--env=TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"


def torch_214() -> Path:
    """The interpreter with torch 2.14, which training in place needs. Raises BenchmarkError if there is none."""
    python = Path(os.environ.get("ELASTIC_HPC_TORCH_214") or ROOT / ".venv-2.14" / "bin" / "python")
    if not python.exists():
        raise BenchmarkError(f"{python} is missing: make it with  bin/setup-venv live 2.14.1, or leave out {LIVE}")
    return python


def launcher_template(at: Cluster, name: str, module: str, *options: str) -> str:
    """The option of elastic-sbatch that runs ``module`` in place of torchrun, with ``options`` and torchrun's own."""
    words = json.dumps([module, *options])
    template = at.home / f"{name}.sbatch.j2"
    template.write_text(
        "#!/bin/bash\n"
        '{% include "directives.j2" %}\n'
        '{% include "prepare.j2" %}\n'
        f"{{% set at = torchrun_command.index('{TORCHRUN_MODULE}') %}}\n"
        f"srun {{{{ srun_options|quote_all }}}} \\\n"
        f"  {{{{ (torchrun_command[:at] + {words} + torchrun_command[at + 1:])|quote_all }}}}\n"
    )
    return f"--template={template}"


def pip_install(folder: Path, name: str, *arguments: str) -> None:
    """Install packages into ``folder``. Raises BenchmarkError, which calls the packages ``name``, if that fails."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", f"--target={folder}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or "pip printed nothing").splitlines()[-1]
        raise BenchmarkError(f"{name} does not install here: {reason}")


def install_ft_launcher(at: Cluster, *options: str) -> list[str]:
    """Install NVIDIA's launcher in a folder of the cluster's user. Returns the options of elastic-sbatch that run it
    with ``options``.
    """
    folder = at.home / FT
    packages = ["nvidia-resiliency-ext", "psutil", "defusedxml", "nvidia-ml-py", "pyyaml"]
    try:
        pip_install(folder, FT, "--no-deps", *packages)  # torch is there already
    except BenchmarkError as error:
        raise BenchmarkError(f"{error}; leave it out: --launchers") from None
    at.run("env", f"PYTHONPATH={folder}", sys.executable, "-c", f"import {FT_MODULE}")
    template = launcher_template(at, FT, FT_MODULE, "--ignore-missing-fault-tol-cfg", *options)
    return [template, f"--env=PYTHONPATH={folder}", "--env=GLOO_SOCKET_IFNAME=eth0", "--env=OMP_NUM_THREADS=1"]


def installed(folder: Path, package: str) -> str:
    """The version that pip has installed into ``folder``, "" if there is none."""
    found = sorted(folder.glob(f"{package.replace('-', '_')}-*.dist-info"))
    return found[0].name.split("-")[1].removesuffix(".dist") if found else ""


def peer_name(launcher: str, torch: str) -> str:
    """How run.py's table names a launcher that is torchrun of this version of torch."""
    return f"{launcher.replace('-own-store', ', own store')} {torch}"
