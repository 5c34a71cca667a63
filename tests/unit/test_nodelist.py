"""Many nodes in few words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_hpc.nodelist import MOST, fold, numbers, spans


@given(st.lists(st.integers(0, 300)))
def test_numbers_come_back_from_their_spans_in_the_same_order(given_: list[int]) -> None:
    assert numbers(spans(given_)) == tuple(given_)


def test_a_thousand_numbers_are_a_few_words() -> None:
    assert spans(node for node in range(1024) if node != 512) == "0-511,513-1023"


@pytest.mark.parametrize("text", ["x", "1-", "-1", f"0-{MOST}", f"0-{MOST - 1},7", "1,,2"])
def test_what_spans_does_not_write_is_refused(text: str) -> None:
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
def test_names_are_folded_as_slurm_does(names: list[str], text: str) -> None:
    assert fold(names) == text
