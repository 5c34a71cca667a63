"""The job avoids nodes that failed, as long as enough others remain."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from elastic_hpc.membership.strikes import EXPIRY, Strike, dump, excluded, live, load, readmitted

NOW = 1_000_000.0
HOUR = 3600.0
nodes = st.sampled_from([f"n{k}" for k in range(8)])
times = st.floats(NOW - 2 * EXPIRY.total_seconds(), NOW + HOUR)
strikes = st.lists(st.builds(Strike, nodes, times, st.text()))


def test_the_node_with_the_most_strikes_is_excluded_first_then_the_most_recent_one():
    found = [Strike("n1", NOW - 9, "lost"), Strike("n2", NOW - 5, "lost"), Strike("n1", NOW - 3, "lost")]
    found += [Strike("n3", NOW - 1, "lost")]
    assert excluded(found, NOW, ["n1", "n2", "n3", "n4"], 2) == ("n1", "n3")


def test_a_node_that_is_down_now_is_excluded_in_addition():
    assert excluded([Strike("n1", NOW, "lost"), Strike("n2", NOW, "lost")], NOW, ["n2", "n3"], 1) == ("n1", "n2")


def test_a_strike_expires_and_its_node_is_readmitted():
    old = Strike("n1", NOW - EXPIRY.total_seconds(), "lost")
    assert excluded([old], NOW, ["n1", "n2"], 1) == ()
    assert readmitted([old], ()) == ("n1",)


def test_an_invalid_strike_is_skipped():
    good = {"node": "n1", "time": 1.0, "reason": "lost"}
    assert load([good, {"node": "n2"}, {**good, "time": "soon"}]) == (Strike("n1", 1.0, "lost"),)


@given(strikes, st.sets(nodes), st.integers(0, 8))
def test_enough_usable_nodes_are_always_left(found: list[Strike], usable: set[str], wanted: int):
    out = set(excluded(found, NOW, usable, wanted))
    assert len(usable - out) >= min(wanted, len(usable))


@given(strikes, st.sets(nodes), st.integers(0, 8))
def test_only_nodes_with_a_live_strike_are_excluded_each_once(found: list[Strike], usable: set[str], wanted: int):
    out = excluded(found, NOW, usable, wanted)
    assert set(out) <= {strike.node for strike in live(found, NOW)}
    assert len(set(out)) == len(out)
    assert set(out).isdisjoint(readmitted(found, out))


@given(strikes, st.sets(nodes), st.integers(0, 8), st.randoms())
def test_the_choice_does_not_depend_on_the_order_of_the_strikes(found, usable, wanted, random):
    shuffled = list(found)
    random.shuffle(shuffled)
    assert excluded(shuffled, NOW, usable, wanted) == excluded(found, NOW, sorted(usable), wanted)


@given(strikes)
def test_strikes_survive_the_state_file(found: list[Strike]):
    assert load(json.loads(json.dumps(dump(found)))) == tuple(found)
