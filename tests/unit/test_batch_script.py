"""A batch script from a computing centre's page becomes an elastic job."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_hpc.cli.sbatch import main
from elastic_hpc.errors import UsageError
from elastic_hpc.from_batch.convert import from_batch
from elastic_hpc.job.request import Request

PYTORCH = r"""#!/bin/bash

#SBATCH --job-name=multinode-example
#SBATCH --nodes=4
#SBATCH --ntasks=4
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=4

nodes=( $( scontrol show hostnames $SLURM_JOB_NODELIST ) )
nodes_array=($nodes)
head_node=${nodes_array[0]}
head_node_ip=$(srun --nodes=1 --ntasks=1 -w "$head_node" hostname --ip-address)

echo Node IP: $head_node_ip
export LOGLEVEL=INFO

srun torchrun \
--nnodes 4 \
--nproc_per_node 1 \
--rdzv_id $RANDOM \
--rdzv_backend c10d \
--rdzv_endpoint $head_node_ip:29500 \
/shared/examples/train.py 50 10
"""


def read(text: str, *args: str, **environ: str) -> Request:
    return from_batch(text.encode(), "job.sh", args, environ)[0]


def batch(launch: str, *lines: str, head: str = "#SBATCH --nodes=4") -> str:
    return "\n".join(["#!/bin/bash", head, *lines, launch, ""])


def options(found: Request) -> dict[str, str]:
    return {name: value for layer in found.of_script for name, value in layer.options if name != "setup"}


def setup(found: Request) -> list[str]:
    return [value for layer in found.of_script for name, value in layer.options if name == "setup"]


def sbatch(found: Request) -> list[str]:
    given = [each for layer in found.of_script for each in layer.sbatch]
    return [each.option.flag if each.value is None else f"{each.option.flag}={each.value}" for each in given]


def noted(found: Request, text: str) -> bool:
    return any(text in note for note in found.notes)


def test_the_example_of_pytorchs_own_page_is_read() -> None:
    found = read(PYTORCH)
    assert (found.script, found.script_args, found.module) == ("/shared/examples/train.py", ("50", "10"), False)
    assert options(found) == {"nproc-per-node": "1", "nodes": "4"}
    assert sbatch(found) == ["--job-name=multinode-example", "--gpus-per-node=1", "--cpus-per-task=4"]
    assert setup(found) == ["export LOGLEVEL=INFO"]
    taken = "--job-name=multinode-example --gpus-per-node=1 --cpus-per-task=4 --nproc-per-node=1 --nodes=4"
    one_agent = "elastic-sbatch starts one agent on each node"
    rendezvous = "nodes, nodes_array, head_node, head_node_ip: the agents find each other without this"
    assert found.notes == (
        f"job.sh: taken: {taken}, set-up lines: 1, to run: /shared/examples/train.py 50 10",
        f"job.sh line 5: dropped --ntasks=4: {one_agent}, and the agent starts the workers there",
        "job.sh line 6: changed --gpus-per-task=1 to --gpus-per-node=1: a node's agent needs what all its tasks need",
        f"job.sh lines 9, 10, 11, 12, 14: dropped {rendezvous}",
        "job.sh line 17: dropped srun and its options: elastic-sbatch writes its own srun line",
        "job.sh line 17: dropped --rdzv-id=$RANDOM: the ID of the run is the job's ID",
        "job.sh line 17: dropped --rdzv-endpoint=$head_node_ip:29500: the rendezvous is on the job's own first node",
        "job.sh line 17: dropped --rdzv-backend=c10d: the agents meet at a rendezvous on one of the job's nodes",
    )


@pytest.mark.parametrize(
    ("launch", "command", "expected"),
    [
        ("srun torchrun --nproc_per_node=4 train.py", ["train.py"], {"nproc-per-node": "4"}),
        ("torchrun --standalone --nproc-per-node=gpu train.py 1", ["train.py", "1"], {"nproc-per-node": "gpu"}),
        ("srun python -m torch.distributed.run --nnodes=1:4 --max_restarts=3 train.py", ["train.py"],
         {"nodes": "1:4", "max-restarts": "3"}),
        ("python3 -u -m torch.distributed.launch --use_env --nproc_per_node 2 train.py", ["train.py"],
         {"nproc-per-node": "2"}),
        ("srun --cpu-bind=none -l -u torchrun_jsc --rdzv_conf=is_host=1,join_timeout=60 train.py", ["train.py"],
         {"rdzv-conf": "join_timeout=60"}),
        ("srun torchrun --nnodes $SLURM_NNODES --nproc_per_node $SLURM_GPUS_ON_NODE --node_rank $SLURM_NODEID train.py",
         ["train.py"], {}),
        ("srun python -u -m torchrun_jsc --max_restarts 0 train.py", ["train.py"], {}),
        ('srun torchrun "--nnodes=$N" "--nproc-per-node=8" --rdzv-id="$SLURM_JOB_ID" train.py', ["train.py"],
         {"nproc-per-node": "8"}),
        ("cd $SLURM_SUBMIT_DIR && srun torchrun train.py", ["train.py"], {}),
        ("srun torchrun -m pkg.train x", ["pkg.train", "x"], {}),
        ("srun python train.py 'a b' \"it's\"", ["train.py", "a b", "it's"], {}),
        ("python train.py", ["train.py"], {}),
        ("srun --ntasks-per-node=4 python -m pkg.train", ["pkg.train"], {"nproc-per-node": "4"}),
        ("exec torchrun train.py", ["train.py"], {}),
        ("time srun torchrun train.py &> log.txt", ["train.py"], {}),
        ("srun torchrun train.py 2>&1 | tee log || exit 1", ["train.py"], {}),
        ("srun torchrun train.py > out &\nwait", ["train.py"], {}),
        ("uv run --no-sync torchrun train.py", ["train.py"], {}),
        ("conda run -n env --no-capture-output torchrun train.py", ["train.py"], {}),
        ("srun /opt/env/bin/torchrun train.py", ["train.py"], {"python": "/opt/env/bin/python"}),
        ("srun $CONDA/bin/python train.py", ["train.py"], {"python": "/conda/bin/python"}),
        ("srun bash -c 'torchrun --nnodes $SLURM_NNODES --node_rank $SLURM_PROCID train.py 1'", ["train.py", "1"], {}),
        ('srun bash -c "torchrun --rdzv_conf=is_host=\\$(((SLURM_NODEID)) && echo 0 || echo 1) train.py"',
         ["train.py"], {}),
        ("srun --container-image=nvcr.io#nvidia/pytorch --container-mounts=/d:/d torchrun train.py", ["train.py"],
         {"container-image": "nvcr.io#nvidia/pytorch", "container-mounts": "/d:/d", "container-runtime": "pyxis"}),
        ("srun --container=/images/train torchrun train.py", ["train.py"],
         {"container-image": "/images/train", "container-runtime": "oci"}),
        ("srun apptainer exec --nv -B /data,/x:/y image.sif torchrun train.py", ["train.py"],
         {"container-image": "image.sif", "container-mounts": "/data:/data,/x:/y", "container-runtime": "apptainer"}),
        ("srun accelerate launch --multi_gpu --num_machines 4 --num_processes 16 --mixed_precision bf16 train.py",
         ["train.py"], {"nproc-per-node": "4"}),
        ("time -p srun --accel-bind=g -I60 $(which torchrun) train.py", ["train.py"], {}),
        ('srun "$(command -v python)" train.py', ["train.py"], {}),
        ("srun `which torchrun` train.py", ["train.py"], {}),
        ("srun bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; python train.py'", ["train.py"], {}),
        ('srun bash -c "RANK=\\$SLURM_PROCID python train.py"', ["train.py"], {}),
    ],
)  # fmt: skip
def test_every_way_to_start_the_training_is_recognized(
    launch: str, command: list[str], expected: dict[str, str]
) -> None:
    found = read(batch(launch), CONDA="/conda", SLURM_NNODES="7")
    assert [found.script, *found.script_args] == command
    assert options(found) == {"nodes": "4", **expected}


def test_variables_are_followed_as_far_as_options_need_them() -> None:
    found = read(
        batch(
            'srun $LAUNCHER "${ARGS[@]}" $SCRIPT --x',
            "GPUS=4", "NNODES=$SLURM_NNODES", "SCRIPT=$PWD/train.py", 'LAUNCHER="torchrun \\\n --nproc_per_node $GPUS"',
            "ARGS=(--nnodes=$NNODES)", "ARGS+=(--max_restarts ${RESTARTS:-2})",
        ),
        PWD="/home/me",
    )  # fmt: skip
    assert options(found) == {"nproc-per-node": "4", "max-restarts": "2", "nodes": "4"}
    assert (found.script, found.script_args) == ("/home/me/train.py", ("--x",))
    assert noted(found, "dropped --nnodes=$NNODES: the number of nodes comes from --nodes")


def test_an_array_that_is_declared_with_options_is_followed() -> None:
    lines = ["declare -a S=(-l)", "local -ar T=(\n--tee 3 # x\n)"]
    found = read(batch('srun "${S[@]}" torchrun "${T[@]}" train.py', *lines))
    assert (found.script, setup(found)) == ("train.py", lines)


def test_counts_that_slurm_derives_from_the_sbatch_lines_are_known() -> None:
    head = "#SBATCH --nodes=2 --tasks-per-node=4 --cpus-per-task=3"
    launch = "srun --ntasks-per-node=1 torchrun --nproc-per-node=$N train.py --threads $SLURM_CPUS_PER_TASK"
    found = read(batch(launch, "N=${SLURM_NTASKS_PER_NODE}", head=head))
    assert options(found) == {"nproc-per-node": "4", "nodes": "2"}
    assert sbatch(found) == ["--cpus-per-task=12"]


def test_cpus_of_a_task_stay_as_the_script_has_assumed() -> None:
    head = "#SBATCH --nodes=2 --ntasks-per-node=4 --cpus-per-task=10"
    line = "export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK"
    found = read(batch("srun python train.py --threads $SLURM_CPUS_PER_TASK", line, head=head))
    assert sbatch(found) == ["--cpus-per-task=40"]
    kept = "elastic_cpus=$SLURM_CPUS_PER_TASK SLURM_CPUS_PER_TASK=10"
    arguments = "elastic_arguments=(--threads $SLURM_CPUS_PER_TASK)"
    assert setup(found) == [kept, line, arguments, "SLURM_CPUS_PER_TASK=$elastic_cpus"]
    assert setup(read(batch("srun python train.py", "module load a", head=head))) == ["module load a"]


def test_variables_of_an_srun_line_keep_their_blanks() -> None:
    found = read(batch("srun --export=ALL,A='b c',D=$E torchrun train.py"))
    assert setup(found) == ["export A='b c'", 'export D="$E"']


def test_commands_that_ran_on_each_node_before_the_launch_and_now_run_only_on_the_first_are_reported() -> None:
    found = read(batch("srun bash -c 'module load a; cp -r /data /tmp; export A=1; torchrun train.py'"))
    assert setup(found) == ["module load a", "cp -r /data /tmp", "export A=1"]
    told = [note for note in found.notes if "ran on each node" in note]
    now = "ran on each node, and now runs on the first node only"
    for_all = "for all nodes: --setup 'srun --ntasks-per-node=1 cp -r /data /tmp'"
    assert told == [f"job.sh line 3: 'cp -r /data /tmp' {now}; {for_all}"]


def test_sizes_in_arguments_that_do_not_fit_an_elastic_job_are_reported() -> None:
    found = read(batch("srun python train.py --world $((SLURM_NTASKS * 2)) --port $((MASTER_PORT + 1))",
                       "MASTER_PORT=29500"))  # fmt: skip
    assert noted(found, "$SLURM_NTASKS does not")
    assert setup(found)[0] == "MASTER_PORT=29500"


@pytest.mark.parametrize(
    ("head", "launch", "expected"),
    [
        ("#SBATCH -N 2\n#SBATCH --ntasks-per-node=4\n#SBATCH --gpus-per-task=1\n#SBATCH -c 8", "srun python train.py",
         ["--gpus-per-node=4", "--cpus-per-task=32", "--nodes=2", "--nproc-per-node=4"]),
        ("#SBATCH -N 2\n#SBATCH -n 8 -c 8\n#SBATCH --gpus 8", "srun python train.py",
         ["--cpus-per-task=32", "--gpus-per-node=4", "--nodes=2", "--nproc-per-node=4"]),
        ("#SBATCH --ntasks=4 # one each\n##SBATCH --nodes=9\n#SBATCH --gpus-per-task=a100:2", "srun torchrun train.py",
         ["--gpus-per-node=a100:2", "--nodes=4"]),
        ("#SBATCH --nodes=2-4\n#SBATCH --gres=gpu:4", "srun torchrun train.py", ["--gres=gpu:4", "--nodes=2:4"]),
        ("#SBATCH --time 24:00:00     # format: HH:MM:SS\n#SBATCH -p gpu -A me\n#SBATCH --out=o --err=e",
         "torchrun train.py", ["--time=24:00:00", "--partition=gpu", "--account=me", "--output=o", "--error=e",
                               "--nodes=1"]),
        ("#SBATCH -J 'my job' --comment=\"a # b\"", "torchrun train.py",
         ["--job-name=my job", "--comment=a # b", "--nodes=1"]),
        ("#SBATCH --signal=SIGUSR1@300", "torchrun train.py",
         ["--signal=URG@300", "--drain-signal=SIGUSR1", "--nodes=1"]),
        ("#SBATCH --signal=B:USR1@300", "torchrun train.py", ["--signal=B:USR1@300", "--nodes=1"]),
        ("", "srun -N 3 -n 3 --gpus-per-task=2 torchrun train.py", ["--gpus-per-node=2", "--nodes=3"]),
        ("#SBATCH -n 8 --mem-per-cpu=4000", "torchrun --standalone --nproc-per-node=4 train.py",
         ["--mem-per-cpu=4000", "--mincpus=8", "--nodes=1", "--nproc-per-node=4"]),
        ("#SBATCH -N 2\n#SBATCH --ntasks-per-node=4 --gpus-per-task=1", "srun --ntasks-per-node=1 torchrun train.py",
         ["--gpus-per-node=4", "--mincpus=4", "--nodes=2"]),
        ("#SBATCH -N 2\n#SBATCH --ntasks-per-node=4", "srun --ntasks-per-node=2 python train.py",
         ["--mincpus=4", "--nodes=2", "--nproc-per-node=2"]),
        ("#SBATCH -N 2\n#SBATCH --ntasks-per-node=4 --cpus-per-gpu=8", "srun python train.py",
         ["--cpus-per-gpu=8", "--nodes=2", "--nproc-per-node=4"]),
    ],
)  # fmt: skip
def test_tasks_become_workers_of_one_agent_on_each_node(head: str, launch: str, expected: list[str]) -> None:
    found = read(batch(launch, head=head))
    assert [*sbatch(found), *sorted(f"--{k}={v}" for k, v in options(found).items())] == expected


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("--no-requeue", "dropped --no-requeue: an elastic job comes back through the queue"),
        ("--requeue", "dropped --requeue: elastic-sbatch sets it anyway"),
        ("--open-mode=append", "sets it anyway"), ("--open-mode=truncate", "a requeue would wipe the log"),
        ("--export=NONE", "the agents need the environment of the submission"), ("--parsable", "command line"),
        ("--use-min-nodes", "it makes Slurm prefer MIN nodes"), ("--container=x", "use --container-image IMAGE"),
    ],
)  # fmt: skip
def test_options_that_an_elastic_job_cannot_have_are_dropped_with_the_reason(line: str, reason: str) -> None:
    found = read(batch("srun torchrun train.py", head=f"#SBATCH --nodes=2\n#SBATCH {line}"))
    assert any(note.startswith("job.sh line 3: dropped ") and reason in note for note in found.notes)
    assert sbatch(found) == []


def test_setup_lines_stay_whole_and_in_order_and_lines_for_the_old_rendezvous_are_dropped() -> None:
    lines = [
        "set -euo pipefail", "module purge", "if [ -d venv ]; then\n  source venv/bin/activate\nfi",
        "cat > hosts <<E\nit's\nE", "export MASTER_PORT=$(expr 10000 + $(echo -n $SLURM_JOBID | tail -c 4))",
        'mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        'export RDZV_ENDPOINT="${nodes[0]}:29500"', "export WORLD_SIZE=$(($SLURM_NNODES * 4))", "echo $RDZV_ENDPOINT",
        "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK",
        "trap 'save' USR1", "HF_HOME=/x; export HF_HOME", "for i in 1 2; do echo $i; done", "first=$(hostname)",
    ]  # fmt: skip
    found = read(batch("A=1 srun torchrun --rdzv_endpoint=$RDZV_ENDPOINT train.py --host $first\necho done", *lines))
    assert setup(found) == [
        *lines[:4], "HF_HOME=/x", "export HF_HOME", *lines[-2:], "export A=1", "elastic_arguments=(--host $first)",
    ]  # fmt: skip
    for text in (
        "dropped MASTER_PORT, nodes, RDZV_ENDPOINT, WORLD_SIZE: the agents find each other",
        "dropped 'export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK'", "dropped trap",
        "dropped what follows the launch, 'echo done'",
    ):  # fmt: skip
        assert noted(found, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (batch("for lr in 1 2; do\n  srun torchrun train.py\ndone"), "job.sh line 3: the launch is in a loop"),
        (batch("run() {\n  srun torchrun train.py\n}\nrun"), "job.sh line 3: the launch is in a loop, a condition"),
        (batch("srun torchrun a.py\nsrun torchrun b.py"), "job.sh lines 3, 4: several launches; expected one"),
        (batch("srun torchrun a.py &\nsrun torchrun b.py &\nwait"), "job.sh lines 3, 4: several launches"),
        (batch("mpirun -np 8 python train.py"), "job.sh line 3: mpirun: MPI starts the workers"),
        (batch("srun ./run.sh a"), "job.sh line 3: 'srun ./run.sh a' starts what is not looked into; expected"),
        (batch("bash run.sh"), "job.sh line 3: 'bash run.sh' starts what is not looked into; expected"),
        (batch("ibrun torchrun train.py"), "job.sh line 3: 'ibrun' in front of torchrun is not supported"),
        (batch("srun nsys profile -o x python t.py"), "job.sh line 3: 'nsys' in front of python is not supported"),
        (batch("srun ${P} python t.py"), "job.sh line 3: ${P} in front of python is known only when the"),
        (batch('srun bash -c "$P python t.py"'), "job.sh line 3: $P in front of python is known only when"),
        (batch("srun $P -l torchrun t.py"), "job.sh line 3: $P in front of torchrun is known only when the"),
        (batch("srun python - <<E\nE"), "job.sh line 3: 'srun python - <<E' starts what is not"),
        (batch("srun $CMD"), "job.sh line 3: 'srun $CMD' starts what is not looked into; expected"),
        (batch("echo python; hostname"), "job.sh has no line that starts torchrun, or python with srun"),
        (batch("srun -n1 python a.py : -n2 python b.py"), "job.sh line 3: srun with several commands"),
        (batch("srun --het-group=0 python a.py"), "job.sh line 3: srun with several commands"),
        (batch("srun torchrun $ARGS train.py"), "job.sh line 3: the value of $ARGS is known only when"),
        (batch("srun accelerate launch --config_file c.yaml train.py"), "job.sh line 3: accelerate launch: --config"),
        (batch("srun shifter --image=x torchrun train.py"), "job.sh line 3: shifter: Shifter containers"),
        (batch("srun bash -c 'torchrun train.py --rank $SLURM_PROCID'"), "job.sh line 3: $SLURM_PROCID: Slurm's tasks"),
        (batch("srun apptainer exec a.sif bash -c 'source e.sh; torchrun t.py'"), "job.sh line 3: 'source e.sh' runs"),
        (batch("srun torchrun train.py 'x"), "job.sh line 3: "),
        (batch("if true; then"), "job.sh line 3: expected 'fi' before the end of the file"),
        (batch("torchrun train.py", head="#SBATCH --nonsense"), "job.sh line 2: --nonsense: unknown option"),
        (batch("torchrun train.py", head="#SBATCH nodes=4"), "job.sh line 2: '#SBATCH nodes=4': expected options"),
        (batch("srun python train.py", head="#SBATCH --ntasks=8"), "job.sh line 2: --ntasks=8: on how many nodes?"),
        ("#!/usr/bin/env python3\nimport os\n", "job.sh: a script for python3; expected a batch script for bash"),
        ("#!/bin/tcsh\nsetenv A 1\n", "job.sh: a script for tcsh; expected a batch script for bash"),
        ("srun torchrun train.py\n", "job.sh: no #! line; expected a batch script for bash"),
        ("#!/bin/bash\r\nsrun torchrun train.py\r\n", "job.sh: has DOS line breaks"),
    ],
)  # fmt: skip
def test_an_ambiguous_script_is_refused_with_the_line(text: str, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        read(text)
    assert str(refused.value).startswith(message)


ARGUMENTS = r"""#!/bin/bash -eu
#SBATCH --nodes=2
LR=1e-3
EXTRA="--a --b"
LIST=(x "y z")
run_dir=runs/$SLURM_JOB_ID
warned=1
code=mine
warn() { echo hello; }
cd sub && export PLACE=there DIR=${ELASTIC_HPC_RUN_DIR:-elastic-logs/$SLURM_JOB_ID}
srun torchrun --nnodes=2 --rdzv_id=$SLURM_JOB_ID train.py --lr=${LR} "it's $EXTRA" $EXTRA "${LIST[@]}" \
  --out "$run_dir/$(basename "$PWD")" '$LR' *.py ~ "$@" $1 $((1 + 2)) ${UNSET:-default} "$code" $PLACE $(basename $DIR)
"""


def test_the_training_script_gets_what_the_batch_script_would_have_given_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in "bin", "sub":
        (tmp_path / folder).mkdir()
    for name in "job.sh", "sub/train.py", "sub/other.py":
        (tmp_path / name).write_text("pass")
    (tmp_path / "job.sh").write_text(ARGUMENTS)
    for name, text in {"srun": f"printf '%s\\0' \"$@\" > {tmp_path}/argv", "scontrol": "echo n1"}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    environ = {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "HOME": "/home/me", "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]",
    }  # fmt: skip

    def trained_with(script: str, *args: str) -> list[bytes]:
        subprocess.run(["bash", script, *args], env=environ, check=True, timeout=30, cwd=tmp_path)
        words = (tmp_path / "argv").read_bytes().split(b"\0")
        return words[words.index(b"train.py") : -1]

    assert main(["--dry-run", "--quiet", "--from-batch", "job.sh", "1 2", "3"]) == 0
    script = capfdbinary.readouterr().out.decode().partition("\nexec ")[0]
    (tmp_path / "elastic.sh").write_text(script)
    assert trained_with("elastic.sh") == trained_with("job.sh", "1 2", "3")
    assert (
        f"--run-dir\0{tmp_path}/elastic-logs/7\0" not in (tmp_path / "argv").read_text()
    )  # the last argument was job.sh itself
    trained_with("elastic.sh")
    assert f"--run-dir\0{tmp_path}/elastic-logs/7\0" in (tmp_path / "argv").read_text()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a script and without a configuration file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    (tmp_path / "train.py").write_text("pass")
    return tmp_path


def test_a_folder_named_after_the_job_id_is_noted_as_a_resumed_job_has_a_new_one(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        "OUT=$PWD/runs/$SLURM_JOB_ID",
        "echo $SLURM_JOB_ID",
        "A=${ELASTIC_HPC_RUN_DIR:-$SLURM_JOB_ID}",
        "scontrol show job $SLURM_JOBID",
    ]
    launch = "srun torchrun train.py --out $OUT --name ${SLURM_ARRAY_JOB_ID}"
    (project / "job.sh").write_text(batch(launch, *lines))
    new = "which is new after --resume; for checkpoints use $ELASTIC_HPC_RUN_DIR or a fixed folder"

    def noted(*argv: str) -> list[str]:
        assert main(["--dry-run", *argv]) == 0
        return [line for line in capsys.readouterr().err.splitlines() if new in line]

    arguments = "the arguments, as written on that line: 'elastic_arguments=(--out $OUT --name ${SLURM_ARRAY_JOB_ID})'"
    assert noted("--from-batch", "job.sh") == [
        f"elastic-sbatch: job.sh line 3: '{lines[0]}' contains $SLURM_JOB_ID, {new}",
        f"elastic-sbatch: job.sh line 7: {arguments} contains $SLURM_ARRAY_JOB_ID, {new}",
    ]
    assert noted("-N2", "--setup", "cd $SLURM_JOB_ID", "train.py") == [
        f"elastic-sbatch: command line: 'cd $SLURM_JOB_ID' contains $SLURM_JOB_ID, {new}"
    ]
    assert noted("-N2", "--setup", "module load cuda", "train.py") == []


@pytest.mark.parametrize(("nodes", "code"), [("4", 0), ("2:4", 2)])
def test_gpus_of_the_whole_job_are_refused_for_a_number_of_nodes_that_varies(
    project: Path, capsys: pytest.CaptureFixture[str], nodes: str, code: int
) -> None:
    (project / "job.sh").write_text(batch("srun torchrun train.py", head="#SBATCH --nodes=3 --gpus=8"))
    assert main(["--dry-run", "--from-batch", "job.sh", "--nodes", nodes]) == code
    refused = "--gpus=8 (job.sh line 2): is for the whole job, and its number of nodes varies; use --gpus-per-node=N\n"
    assert capsys.readouterr().err.endswith(refused) == bool(code)


def test_arguments_for_a_script_that_takes_none_are_refused() -> None:
    with pytest.raises(UsageError, match=r"^'other\.py' after --from-batch job\.sh: that batch script uses no arg"):
        read(PYTORCH, "other.py")


def test_the_command_line_wins_over_the_batch_script_and_the_notes_say_how_to_make_it_elastic(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "job.sh").write_text(batch("srun torchrun train.py", head="#SBATCH --nodes=4 -p gpu --time=1:00:00"))
    assert main(["--dry-run", "--from-batch", "job.sh"]) == 0
    out, err = capsys.readouterr()
    advice = "job.sh line 2: the job needs all its 4 nodes; to let it run on fewer, for example: --nodes 2:4"
    assert f"elastic-sbatch: {advice}\n" in err
    assert f"# {advice}\n" in out
    assert re.search(r"^  --nodes 4:4 +# job\.sh line 2; #SBATCH --nodes must match$", out, re.MULTILINE)
    with monkeypatch.context() as terminal:
        for stream in sys.stdout, sys.stderr:
            terminal.setattr(stream, "isatty", lambda: True)
        assert main(["--dry-run", "--from-batch", "job.sh"]) == 0
    assert capsys.readouterr() == (out, ""), "a terminal shows the list once"
    assert main(["--dry-run", "--from-batch", "job.sh", "--nodes", "2:4", "-p", "cpu", "--spares=1"]) == 0
    out, err = capsys.readouterr()
    assert "to let it run on fewer" not in err
    assert "job.sh: taken: --time=1:00:00, to run: train.py\n" in err
    for replaced in "--nodes=4 replaced by --nodes=2:4", "--partition=gpu replaced by --partition=cpu":
        assert f"job.sh line 2: {replaced} of the command line\n" in err
    for line in "--nodes=2-5 ", "--partition=cpu ", "--time=1:00:00 ":
        assert f"#SBATCH {line}" in out
    (project / "job.sh").write_text(batch("srun torchrun train.py", "source venv/bin/activate"))
    brings = "job.sh line 3: 'source venv/bin/activate': agents and workers run with "
    assert main(["--dry-run", "--from-batch", "job.sh"]) == 0
    err = capsys.readouterr().err
    assert f"elastic-sbatch: {brings}{sys.executable}; " in err
    assert "to use the Python that this line activates, install elastic_hpc there and add --python python\n" in err
    assert main(["--dry-run", "--from-batch", "job.sh", "--python", "python"]) == 0
    assert brings not in capsys.readouterr().err
    for argv, message in {
        ("--from-batch", "none.sh"): "--from-batch none.sh: No such file or directory",
        ("-m", "--from-batch", "job.sh"): "-m or --no-python with --from-batch job.sh: the batch script says that",
    }.items():
        assert main([*argv]) == 2
        assert message in capsys.readouterr().err
