import argparse
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_hpc.errors import UsageError
from elastic_hpc.spec import LAUNCH_OPTIONS, Endpoint, LaunchSpec, NodeRange, RdzvConf, add_launch_options

counts = st.integers(0, 999999)
seconds = st.integers(1, 86400).map(lambda s: timedelta(seconds=s))
specs = st.builds(
    LaunchSpec,
    script=st.sampled_from(["train.py", "--odd.py", "a b.py", "pkg.train"]),
    script_args=st.lists(st.text() | st.sampled_from(["--", "-m", "--nodes", ""])).map(tuple),
    module=st.booleans(),
    nodes=st.tuples(st.integers(1, 999), st.integers(0, 999)).map(lambda t: NodeRange(t[0], t[0] + t[1])),
    nproc_per_node=st.sampled_from([None, "gpu", "cpu", "auto", "8"]),
    max_restarts=counts,
    max_requeues=counts,
    rdzv_endpoint=st.builds(Endpoint, st.sampled_from([None, "n1", "n1.x.org", "fe80::1"]), st.integers(1, 65535)),
    rdzv_id=st.sampled_from([None, "run-7"]),
    rdzv_conf=st.builds(RdzvConf, seconds, seconds),
    heartbeat_timeout=seconds,
    interface=st.sampled_from([None, "ib0"]),
)


@given(specs)
def test_the_agent_reads_from_its_command_line_what_the_user_asked_for(spec):
    parser = argparse.ArgumentParser()
    add_launch_options(parser)
    parser.add_argument("script")
    parser.add_argument("script_args", nargs=argparse.REMAINDER)
    words = [word for pair in spec.options() for word in pair]
    expected = spec.module or None
    parsed = parser.parse_args([*words, *spec.command()])
    assert parsed.module == expected
    assert LaunchSpec.from_namespace(parsed) == spec


@pytest.mark.parametrize(("text", "slurm"), [("4", "4"), ("4:8", "4-8"), ("3:3", "3")])
def test_a_node_range_is_written_in_sbatchs_notation(text, slurm):
    assert NodeRange.parse(text).slurm == slurm


@pytest.mark.parametrize("text", ["", "0", "0:2", "8:4", "4-8", "4:", ":4", "a", "4:8:9", " 4"])
def test_a_wrong_node_range_is_refused_with_an_example(text):
    with pytest.raises(UsageError, match=r"--nodes .*expected N or MIN:MAX.*--nodes 4:8"):
        NodeRange.parse(text)


@pytest.mark.parametrize("option", [o for o in LAUNCH_OPTIONS if o.type is not str], ids=lambda o: o.flag)
@pytest.mark.parametrize("text", ["", "x y", "-1", "0.0.0", "1,2"])
def test_every_refusal_names_the_option(option, text):
    if option.flag == "--rdzv-conf" and text == "":
        assert option.parse(text) == RdzvConf()
        return
    if option.flag == "--rdzv-endpoint" and text in {"-1", "0.0.0", "1,2"}:
        return  # a host name to judge for the resolver
    with pytest.raises(UsageError, match=f"^{option.flag} .*expected"):
        option.parse(text)
