import argparse
import signal
from dataclasses import fields, replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_hpc.errors import UsageError
from elastic_hpc.options.spec import LaunchSpec
from elastic_hpc.options.table import LAUNCH_OPTIONS, add_launch_options
from elastic_hpc.options.values import DrainSignal, Endpoint, HangTimeout, NodeRange, RdzvConf, SlowNode

counts = st.integers(0, 999999)
seconds = st.integers(1, 86400).map(lambda s: timedelta(seconds=s))
specs = st.builds(
    LaunchSpec,
    script=st.sampled_from(["train.py", "--odd.py", "a b.py", "pkg.train"]),
    script_args=st.lists(st.text() | st.sampled_from(["--", "-m", "--nodes", ""])).map(tuple),
    module=st.booleans(),
    no_python=st.booleans(),
    nodes=st.tuples(st.integers(1, 999), st.integers(0, 999)).map(lambda t: NodeRange(t[0], t[0] + t[1]))
    | st.sets(st.integers(1, 999), min_size=2).map(sorted).map(lambda s: NodeRange(s[0], s[-1], tuple(s))),
    spares=counts,
    world_multiple_of=st.none() | st.integers(1, 999),
    grow=st.booleans(),
    grow_every=seconds,
    free_growth=st.booleans(),
    yield_to=st.sampled_from([None, "pending", "user", "qos:urgent", "partition:gpu"]),
    yield_every=seconds,
    wait_for_nodes=seconds,
    nproc_per_node=st.sampled_from([None, "gpu", "cpu", "auto", "8"]),
    max_restarts=counts,
    max_requeues=counts,
    rdzv_endpoint=st.builds(Endpoint, st.sampled_from([None, "n1", "n1.x.org", "fe80::1"]), st.integers(1, 65535)),
    rdzv_id=st.sampled_from([None, "run-7"]),
    rdzv_conf=st.builds(RdzvConf, seconds, seconds),
    heartbeat_timeout=seconds,
    grace=seconds,
    drain_signal=st.none() | st.sampled_from([0, signal.SIGUSR1, signal.SIGTERM]).map(DrainSignal),
    hang_timeout=st.sampled_from([HangTimeout(), HangTimeout(None, learns=False)])
    | seconds.map(lambda time: HangTimeout(time, learns=False)),
    slow_node=st.builds(SlowNode, st.sampled_from([0.0, 1.5, 2.25]), st.booleans()).filter(
        lambda slow: slow.factor or not slow.leaves
    ),
    preflight=st.sampled_from([None, "", "/opt/site check --gpus"]),
    health_dir=st.sampled_from([None, "/shared/my health"]),
    interface=st.sampled_from([None, "ib0"]),
    role=st.sampled_from([None, "trainer"]),
    tee=st.sampled_from([None, "all", "0,8-15", "3", "0:3,1:3"]),
    local_ranks_filter=st.sampled_from([None, "0", "0,1"]),
    numa_binding=st.sampled_from([None, "node"]),
).map(lambda spec: spec if spec.yield_to else replace(spec, yield_every=LaunchSpec.yield_every))


@given(specs)
def test_the_agent_reads_the_users_options_from_its_command_line(spec):
    parser = argparse.ArgumentParser()
    add_launch_options(parser)
    parser.add_argument("script")
    parser.add_argument("script_args", nargs=argparse.REMAINDER)
    words = [word for pair in spec.options() for word in pair]
    expected = spec.module or None
    parsed = parser.parse_args([*words, *spec.command()])
    assert (parsed.module, parsed.no_python) == (expected, spec.no_python or None)
    assert LaunchSpec.from_namespace(parsed) == spec


def test_no_option_is_left_out_of_the_round_trip():
    assert {option.dest for option in LAUNCH_OPTIONS} | {"script", "script_args", "module", "no_python"} == {
        field.name for field in fields(LaunchSpec)
    }


@pytest.mark.parametrize(
    ("text", "slurm"), [("4", "4"), ("4:8", "4-8"), ("3:3", "3"), ("4-8", "4-8"), ("4,6,8", "4-8"), ("4-8:2", "4-8")]
)
def test_a_node_range_is_written_in_sbatchs_notation(text, slurm):
    assert NodeRange.parse(text).slurm == slurm


def test_an_exact_set_of_nodes_is_written_as_it_was_given():
    nodes = NodeRange.parse("4,6,8")
    assert (nodes.min, nodes.max, nodes.sizes, str(nodes)) == (4, 8, (4, 6, 8), "4,6,8")


@pytest.mark.parametrize(
    ("text", "meaning"),
    [("4-8", "4:8"), ("4-4", "4:4"), ("4-8:2", "4,6,8"), ("4-8:5", "4:4"), ("1-3,8", "1,2,3,8"), ("2,4-8:4", "2,4,8")],
)
def test_nodes_may_be_written_as_for_sbatch(text, meaning):
    assert NodeRange.parse(text) == NodeRange.parse(meaning)


@pytest.mark.parametrize(
    ("text", "head", "port"),
    [
        ("localhost:0", None, 29400),
        ("127.0.0.1:29500", None, 29500),
        ("[::1]:7", None, 7),
        ("n1:0", "n1", 29400),
        (":5", None, 5),
    ],
)
def test_torchruns_endpoints_on_the_same_host_mean_the_first_host_here(text, head, port):
    endpoint = Endpoint.parse(text)
    assert (endpoint.head, endpoint.port) == (head, port)


def test_the_settings_of_torchs_own_rendezvous_are_accepted_without_effect():
    given = RdzvConf.parse("timeout=900,read_timeout=60,is_host=1,join_timeout=10m")
    assert given == RdzvConf(join_timeout=timedelta(minutes=10))
    with pytest.raises(UsageError, match=r"^--rdzv-conf join_timeout='soon': expected a time"):
        RdzvConf.parse("join_timeout=soon")


@pytest.mark.parametrize(
    ("nodes", "spares", "slurm"), [("4", 0, "4"), ("4", 2, "4-6"), ("4:8", 2, "4-10"), ("4,6,8", 1, "4-9")]
)
def test_the_job_requests_spares_too_but_does_not_wait_for_them(nodes, spares, slurm):
    spec = LaunchSpec("t.py", nodes=NodeRange.parse(nodes), spares=spares)
    assert spec.asks_slurm(grows_elsewhere=False).slurm == slurm


@pytest.mark.parametrize(
    ("nodes", "multiple", "nproc", "sizes"),
    [
        ("4:8", None, 1, (4, 5, 6, 7, 8)),
        ("4,6,8", None, 1, (4, 6, 8)),
        ("4:8", 3, 1, (6,)),
        ("4:8", 4, 2, (4, 6, 8)),
        ("4:8", 4, 8, (4, 5, 6, 7, 8)),
        ("4,6,9", 6, 2, (6, 9)),
    ],
)
def test_a_world_has_an_allowed_number_of_nodes_that_gives_the_right_multiple_of_workers(nodes, multiple, nproc, sizes):
    spec = LaunchSpec("t.py", nodes=NodeRange.parse(nodes), world_multiple_of=multiple, spares=9)
    assert spec.sizes(nproc) == sizes


@pytest.mark.parametrize(
    ("nodes", "multiple", "nproc", "message"),
    [
        ("4:6", 8, 1, "1 worker on each; expected a multiple of 8, for example --nodes 8"),
        ("4,8", 12, 2, "2 workers on each; expected a multiple of 6, for example --nodes 6"),
    ],
)
def test_an_impossible_multiple_is_refused_with_a_possible_one(nodes, multiple, nproc, message):
    spec = LaunchSpec("t.py", nodes=NodeRange.parse(nodes), world_multiple_of=multiple)
    with pytest.raises(UsageError, match=f"^--world-multiple-of {multiple}: .* --nodes {nodes} fits, with {message}$"):
        spec.sizes(nproc)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "0:2",
        "8:4",
        "8-4",
        "4-8:0",
        "4:8:2",
        "8-4,9",
        "4-",
        "4:",
        ":4",
        "a",
        "4:8:9",
        " 4",
        "4,",
        ",4",
        "0,2",
        "4,4",
        "6,4",
        "4, 6",
        "4,6:8",
    ],
)
def test_a_wrong_node_range_is_refused_with_an_example(text):
    with pytest.raises(UsageError, match=r"--nodes .*expected N or MIN:MAX.*--nodes 4:8, .*--nodes 4,6,8"):
        NodeRange.parse(text)


@pytest.mark.parametrize("option", [o for o in LAUNCH_OPTIONS if o.type is not str], ids=lambda o: o.flag)
@pytest.mark.parametrize("text", ["", "x y", "-1", "0.0.0", "1,2", "x:٣", "٣", "1_0", "9" * 5000])
def test_every_refusal_names_the_option(option, text):
    if option.flag == "--rdzv-conf" and text == "":
        assert option.parse(text) == RdzvConf()
        return
    if option.flag == "--rdzv-endpoint" and text in {"-1", "0.0.0", "1,2", "٣", "1_0", "9" * 5000}:
        return  # a host name that only the resolver can judge
    if option.flag in {"--nodes", "--tee", "--local-ranks-filter"} and text == "1,2":
        return  # an exact set
    with pytest.raises(UsageError, match=f"^{option.flag} .*expected"):
        option.parse(text)


@pytest.mark.parametrize(
    ("text", "limit", "learns"),
    [("auto", None, True), ("off", None, False), ("0", None, False), ("10m", 600, False), ("15", 15, False)],
)
def test_a_hang_timeout_is_learned_or_given_or_off(text: str, limit: float | None, *, learns: bool) -> None:
    read = HangTimeout.parse(text)
    assert (read.limit and read.limit.total_seconds(), read.learns) == (limit, learns)
    assert HangTimeout.parse(str(read)) == read


@pytest.mark.parametrize("text", ["never", "-5", "", "auto,off"])
def test_an_invalid_hang_timeout_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match=r"expected auto, off, or a time above 0, for example --hang-timeout 10m"):
        HangTimeout.parse(text)


@pytest.mark.parametrize(
    ("text", "factor", "leaves"),
    [("1.5", 1.5, False), ("2:leave", 2, True), ("off", 0, False), ("1.25:leave", 1.25, True)],
)
def test_a_slow_node_is_named_or_left_or_not_looked_for(text: str, factor: float, *, leaves: bool) -> None:
    read = SlowNode.parse(text)
    assert (read.factor, read.leaves) == (factor, leaves)
    assert str(read) == text


@pytest.mark.parametrize("text", ["1", "0", "-2", "", "leave", "1.5:go", "1.5:", "off:leave", "inf", "1e3"])
def test_an_invalid_value_for_slow_nodes_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match=r"expected FACTOR or FACTOR:leave .* for example --slow-node 1.5:leave"):
        SlowNode.parse(text)
