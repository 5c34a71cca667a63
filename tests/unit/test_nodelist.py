"""Compact lists of many nodes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_hpc.membership.nodes import MAX_NODES, NumberRanges, fold, name_matcher, numbers, spans


@given(st.lists(st.integers(0, 300)))
def test_spans_expand_to_the_same_numbers_in_the_same_order(given_: list[int]) -> None:
    assert numbers(spans(given_)) == tuple(given_)


def test_a_thousand_numbers_fold_into_a_few_words() -> None:
    assert spans(node for node in range(1024) if node != 512) == "0-511,513-1023"


@pytest.mark.parametrize("text", ["x", "1-", "-1", f"0-{MAX_NODES}", f"0-{MAX_NODES - 1},7", "1,,2"])
def test_text_that_spans_does_not_write_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        numbers(text)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], ""),
        (["n5"], "n5"),
        (["n7", "n5", "n6"], "n[5-7]"),
        (["n9", "n10", "n12"], "n[9-10,12]"),
        (["n001", "n002", "n010"], "n[001-002,010]"),
        (["n09", "n10"], "n[09-10]"),
        (["n09", "n100"], "n09,n100"),
        (["gpu1-ib", "gpu2-ib", "login", "cpu1"], "cpu1,gpu[1-2]-ib,login"),
        (["r1n1", "r1n2", "r2n1"], "r1n[1-2],r2n1"),
    ],
)
def test_names_are_folded_as_slurm_folds_them(names: list[str], text: str) -> None:
    assert fold(names) == text


@given(st.sets(st.integers(0, 2000)), st.integers(0, 2000))
def test_a_folded_list_contains_exactly_the_names_that_were_folded(there: set[int], number: int) -> None:
    text = fold(f"n{one}" for one in there)
    assert bool(text and name_matcher(text)(f"n{number}")) == (number in there)


@pytest.mark.parametrize(
    ("text", "has", "lacks"),
    [
        ("n[10-12]", ("n10", "n11", "n12"), ("n1", "n2", "n0", "n13", "n010", "xn10", "n10x")),
        ("n[08-10]", ("n08", "n10"), ("n8", "n010")),
        ("n[1-2,7],login", ("n1", "n7", "login"), ("n3", "login1", "n")),
        ("r[1-2]n[3-4]-ib", ("r1n3-ib", "r2n4-ib"), ("r1n5-ib", "r3n3-ib", "r1n3")),
        ("gpu*", ("gpu1", "gpu-a"), ("cpu1",)),
        ("n?", ("n1", "na"), ("n10",)),
        ("*[1-3]", ("n1", "node-3"), ("n12", "n21")),
        ("n[1-999999999999]", ("n5", "n123456"), ("n0",)),
    ],
)
def test_a_node_list_can_be_checked_for_a_node(text: str, has: tuple[str, ...], lacks: tuple[str, ...]) -> None:
    assert all(map(name_matcher(text), has))
    assert not any(map(name_matcher(text), lacks))


@pytest.mark.parametrize("text", ["", "n[1-", "n1]", "n[3-1]", "n[ab]", "n[]", "n[1-2", ",n1", "n1,,n2", "n[[1]]"])
def test_a_list_that_slurm_would_not_accept_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        name_matcher(text)


def test_a_range_of_numbers_may_be_of_any_length() -> None:
    typed = NumberRanges.of("0-999999999999, 2000000000000")
    assert 7 in typed
    assert 2_000_000_000_000 in typed
    assert 1_000_000_000_000 not in typed
