from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_hpc.errors import UsageError
from elastic_hpc.options.durations import as_text, parse, seconds, slurm_time, time_limit


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 90),
        ("0.5", 0.5),
        (".5", 0.5),
        ("1e3", 1000),
        ("90s", 90),
        ("5m", 300),
        ("1h30m", 5400),
        ("1H30M", 5400),
        ("2d", 172800),
        ("1.5h", 5400),
        ("1d2h3m4s", 93784),
        ("100m", 6000),
        ("5:30", 330),
        ("1:00:01", 3601),
        ("2-1", 176400),
        ("1-12:30:05", 131405),
    ],
)
def test_a_duration_is_seconds_or_has_units_or_is_in_slurms_notation(text, expected):
    assert parse(text) == timedelta(seconds=expected)


@pytest.mark.parametrize(
    "text",
    ["", "0", "0s", "0:00", "-5", "5x", "m5", "30m1h", "1h30", "5 m", "1:2:3:4", "nan", "inf", "9e99", "1_0", "٣"],
)
def test_an_invalid_duration_is_refused_with_examples(text):
    with pytest.raises(UsageError, match=r"expected a time above 0, for example 90 \(seconds\), 5m, 1h30m or 1:30:00"):
        parse(text)


@given(
    st.timedeltas(timedelta(microseconds=1), timedelta(days=90000))
)  # a float cannot hold the microseconds of 272 years
def test_a_written_duration_is_read_back_to_the_microsecond(value):
    assert parse(as_text(value)) == value


@given(st.timedeltas(timedelta(seconds=1), timedelta(days=9999)))
def test_slurm_is_given_a_time_limit_that_is_never_shorter_and_less_than_a_second_longer(value):
    assert timedelta(0) <= time_limit(slurm_time(value)) - value < timedelta(seconds=1)


def test_eight_hours_are_written_in_slurms_notation():
    assert slurm_time(timedelta(hours=8)) == "08:00:00"
    assert slurm_time(timedelta(days=2, seconds=1)) == "2-00:00:01"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5", 300),
        ("5:30", 330),
        ("1:00:01", 3601),
        ("2-1", 49 * 3600),
        ("2-0:30", 48 * 3600 + 1800),
        ("0-0:0:7", 7),
        ("0", None),
        ("-1", None),
        ("UNLIMITED", None),
        ("soon", None),
        ("1:2:3:4", None),
        ("9" * 30, None),
    ],
)
def test_a_time_limit_is_read_as_sbatch_reads_it(text, expected):
    limit = time_limit(text)
    assert (limit and limit.total_seconds()) == expected


def test_a_refusal_names_the_option_of_a_command_that_counts_in_seconds():
    assert seconds("--every")("5m") == 300
    with pytest.raises(UsageError, match=r"^--every 'soon': expected a time above 0"):
        seconds("--every")("soon")
