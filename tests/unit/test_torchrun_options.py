"""The meaning of torchrun's options here."""

import pytest
from torch.distributed.run import get_args_parser

from elastic_hpc.errors import UsageError
from elastic_hpc.options.sbatch import scan
from elastic_hpc.options.torchrun import OPTIONS, parse_command, translate, unneeded


def read(line):
    return parse_command(line.split())


def test_every_option_of_the_installed_torchrun_has_a_meaning_or_a_refusal_with_the_same_arity():
    ours = {option.name: option for option in OPTIONS}
    for action in get_args_parser()._actions:
        if action.option_strings and action.dest != "help":
            option = ours[action.dest.replace("_", "-")]
            assert bool(option.value) == (action.nargs != 0), option
            assert {f"--{action.dest}", option.flag} >= {o for o in action.option_strings if o.startswith("--")}
            assert {o for o in action.option_strings if len(o) == 2} == ({f"-{option.letter}"} - {"-"})


def test_a_torchrun_command_line_is_read_with_dashes_and_underscores():
    line = read("--nnodes=2:4 --nproc_per_node 8 --max_restarts=3 --rdzv-endpoint n1:29400 -m pkg.train --lr 1")
    assert line.options == (
        ("nodes", "2:4"), ("nproc-per-node", "8"), ("max-restarts", "3"), ("rdzv-endpoint", "n1:29400"))  # fmt: skip
    assert (line.module, line.no_python, line.script, line.script_args) == (True, False, "pkg.train", ("--lr", "1"))
    assert line.dropped == ()


def test_options_that_a_batch_script_computes_per_node_are_dropped_with_a_reason():
    line = read("--rdzv_endpoint $HEAD:29400 --node_rank=$SLURM_NODEID --master_addr `hostname` --rdzv_id=$RANDOM a.py")
    assert line.options == ()
    assert [shown for shown, _ in line.dropped] == [
        *("--rdzv-endpoint=$HEAD:29400", "--node-rank=$SLURM_NODEID", "--master-addr=`hostname`", "--rdzv-id=$RANDOM")
    ]
    assert all(reason for _, reason in line.dropped)


@pytest.mark.parametrize(
    ("options", "endpoint"),
    [
        ("--master_addr n1", "n1"),
        ("--master_addr=n1 --master_port=29501", "n1:29501"),
        ("--master-port 29501", ":29501"),
        ("--master-addr 127.0.0.1 --master-port 29501", ":29501"),
        ("--master_addr fe80::1 --master_port 1", "[fe80::1]:1"),
        ("--master_addr=localhost", None),
        ("--master_addr=", None),
        ("--master_addr n1 --rdzv_endpoint n2:1", "n2:1"),
    ],
)
def test_the_masters_address_is_the_endpoint_unless_an_endpoint_is_given(options, endpoint):
    assert dict(read(f"{options} train.py").options).get("rdzv-endpoint") == endpoint


def test_standalone_means_one_node_unless_more_are_requested():
    assert read("--standalone train.py").options == (("nodes", "1"),)
    assert dict(read("--nnodes 2 --standalone train.py").options) == {"nodes": "2"}


@pytest.mark.parametrize(
    "option",
    [
        *("--rdzv_backend=c10d", "--rdzv_backend=static", "--node_rank=0", "--monitor_interval=0.5"),
        *("--start-method=spawn", "--start_method=forkserver", "-r3", "--redirects=0:1,1:2"),
        *("--event_log_handler=null", "--signals-to-handle=SIGTERM,SIGINT", "--run-path", "--use_env"),
    ],
)  # fmt: skip
def test_an_option_that_requests_the_default_is_accepted(option):
    (given,), _ = scan([*option.split(), "train.py"], OPTIONS, ())
    assert translate([given]) == ([], [given])
    assert unneeded(given)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--rdzv-backend=etcd-v2", "--rdzv-backend etcd-v2: the rendezvous runs on one of the job's nodes, without"),
        ("--node-rank=3", "--node-rank 3: one command starts the agents of all nodes and numbers them; leave it out"),
        ("--monitor-interval=often", "expected a number of seconds"),
        ("--start-method=thread", "expected spawn, fork or forkserver"),
        ("--event-log-handler=console", "elastic-hpc timeline JOB"),
        ("--duplicate-stdout-filters=loss", "elastic-hpc logs JOB"),
        ("--logs-specs=mine", "elastic-hpc logs JOB"),
        ("--local-addr=10.0.0.1", "use --interface IFNAME"),
        ("--signals-to-handle=SIGUSR1", "--drain-signal NAME"),
        ("--shutdown-timeout=60", "use --grace SECONDS"),
        ("--virtual-local-rank", "--no-python bash -c"),
    ],
)
def test_an_option_that_requests_something_else_is_refused_with_its_replacement(option, message):
    (given,), _ = scan([option, "train.py"], OPTIONS, ())
    with pytest.raises(UsageError, match=message):
        unneeded(given)
    assert read(f"{option} train.py").dropped[0][1]


def test_an_option_that_torchrun_does_not_know_is_refused_with_the_closest_one():
    with pytest.raises(UsageError, match=r"^--nproc-per-nod: unknown option; did you mean --nproc-per-node\?$"):
        read("--nproc_per_nod=8 train.py")
    with pytest.raises(UsageError, match="expected a script"):
        read("--nnodes=2")
