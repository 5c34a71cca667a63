import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_hpc.errors import UsageError
from elastic_hpc.options.sbatch import COMMAND_LINE_ONLY, SBATCH, Given, Option, WarningSignal, check, scan

values = st.text(min_size=1).filter(lambda text: "\0" not in text)
taking = st.sampled_from([o for o in SBATCH.values() if o.value])
flags = st.sampled_from([o for o in SBATCH.values() if not o.value and o.name not in {"help", "usage", "version"}])


def forms(option, value):
    """Every way to give ``option`` the value."""
    yield [f"{option.flag}={value}"]
    if option.value == "=":
        yield [option.flag, value]
    if option.letter:
        yield [f"-{option.letter}{value}"]
        if option.value == "=":
            yield [f"-{option.letter}", value]


@given(taking, values, st.lists(st.text()))
def test_every_option_is_understood_in_every_form_and_the_script_keeps_its_arguments(option, value, arguments):
    for form in forms(option, value):
        given_options, rest = scan([*form, "train.py", *arguments], ())
        assert [(g.option, g.value) for g in given_options] == [(option, value)]
        assert rest == ["train.py", *arguments]


@given(flags, st.lists(st.text()))
def test_a_flag_takes_no_value(option, arguments):
    assert scan([option.flag, "train.py", *arguments], ()) == ([Given(option, None)], ["train.py", *arguments])
    with pytest.raises(UsageError, match="expected no value"):
        scan([f"{option.flag}=1", "train.py"], ())


def test_an_optional_value_is_never_taken_from_the_next_word():
    given_options, rest = scan(["--exclusive", "train.py"], ())
    assert [(g.name, g.value) for g in given_options] == [("exclusive", None)]
    assert rest == ["train.py"]


def test_letters_may_be_combined_and_the_last_one_may_take_the_rest_or_the_next_word_as_its_value():
    for argv in (["-HOpgpu", "x"], ["-HOp", "gpu", "x"]):
        given_options, rest = scan(argv, ())
        assert [(g.name, g.value) for g in given_options] == [
            ("hold", None), ("overcommit", None), ("partition", "gpu")]  # fmt: skip
        assert rest == ["x"]


def test_options_may_be_repeated_and_keep_their_order():
    given_options, _ = scan(["--mail-user=a", "-d", "1", "--mail-user", "b"], ())
    assert [g.value for g in given_options] == ["a", "1", "b"]


def test_two_dashes_end_the_options():
    assert scan(["--hold", "--", "--odd.py", "--hold"], ())[1] == ["--odd.py", "--hold"]


def test_our_own_options_take_precedence_over_sbatchs():
    module = Option("module", "m", "")
    assert scan(["-m", "pkg.train"], [module]) == ([Given(module, None)], ["pkg.train"])


def test_an_unknown_option_with_a_value_is_left_to_sbatch():
    given_options, _ = scan(["--from-the-future=7", "train.py"], ())
    assert (given_options[0].name, given_options[0].value) == ("from-the-future", "7")
    assert check(given_options[0])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--partitoin", "gpu"], "did you mean --partition.* --partitoin=VALUE"),
        (["--cpus-per", "4"], "did you mean --cpus-per-gpu or --cpus-per-task"),
        (["--partition"], "expected a value: --partition VALUE"),
        (["-p"], "-p: expected a value: --partition VALUE"),
        (["-Hz"], "-z in '-Hz': unknown option"),
        (["--Foo=1"], "unknown option"),
    ],
)
def test_a_mistyped_option_is_answered_with_what_to_type(argv, message):
    with pytest.raises(UsageError, match=message):
        scan(argv, ())


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [(["--part=a"], "partition", "a"), (["--part", "a"], "partition", "a"), (["--sig=USR1@9"], "signal", "USR1@9"),
     (["--no-req"], "no-requeue", None), (["--exclus=user"], "exclusive", "user")],
)  # fmt: skip
def test_an_abbreviated_name_means_the_same_as_in_sbatch(argv, name, value):
    given_options, rest = scan([*argv, "train.py"], ())
    assert (given_options[0].name, given_options[0].value, rest) == (name, value, ["train.py"])


@pytest.mark.parametrize("word", ["--max-restart=3", "--max_restart=3", "--max-restarst=3", "--max-r=3", "--max-r"])
def test_a_word_that_looks_like_an_option_of_ours_does_not_reach_slurm(word):
    with pytest.raises(UsageError, match="did you mean --max-restarts"):
        scan([word, "train.py"], [Option("max-restarts")])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-n", "8"], "--ntasks=8: with a task count Slurm grants only MIN.*--nproc-per-node"),
        (["--ntasks-per-node=8"], "use --nodes MIN:MAX"),
        (["--tasks-per-node=8"], "use --nodes MIN:MAX"),
        (["--ntasks-per-gpu=8"], "follow from the GPUs.*use --gpus-per-node=N, and --nproc-per-node"),
        (["--ntask=8"], "use --nodes MIN:MAX"),  # getopt's abbreviation
        (["--gpus-per-task=1"], "use --gpus-per-node=N"),
        (["--tres-per-task=gres/gpu:1"], "use --gpus-per-node=N"),
        (["--no-requeue"], "--max-requeues 0"),
        (["--requeue=expedite"], "requeue and hold a job that has failed"),
        (["--requeue=expedited"], "requeue and hold a job that has failed"),
        (["-K"], "--max-restarts 0"),
        (["--kill-on-bad-exit=1"], "--max-restarts 0"),
        (["--no-kill=off"], "a lost node ends the whole job"),
        (["--use-min-nodes"], "--nodes N"),
        (["--open-mode=truncate"], "wipe the log"),
        (["--wrap=hostname"], "train.py"),
        (["--export=NONE"], "--export=ALL,NAME=VALUE or --env"),
        (["--export=FOO"], "--export=ALL,NAME=VALUE or --env"),
        (["--signal=TERM@60"], "use --signal=URG@120"),
        (["--signal=X:USR1@60"], r"\[B:\|R:\]SIGNAL"),
        (["--signal=USR1@65536"], r"at most 65535 s"),
    ],
)
def test_an_option_that_breaks_elasticity_is_refused_with_its_replacement(argv, message):
    with pytest.raises(UsageError, match=message):
        check(scan(argv, ())[0][0])


def test_task_counts_that_match_the_default_are_accepted_and_not_passed_to_slurm():
    for option in ("--ntasks-per-node=1", "--tasks-per-node=1"):
        assert not check(scan([option], ())[0][0])
    four = scan(["-n4"], ())[0][0]
    assert not check(four, 4)
    for nodes in (None, 8):
        with pytest.raises(UsageError, match="--ntasks=4: with a task count"):
            check(four, nodes)


def test_tasks_per_core_and_socket_are_passed_to_slurm_which_grants_max_nodes_with_them():
    assert all(check(given) for given in scan(["--ntasks-per-core=1", "--ntasks-per-socket=2"], ())[0])


@pytest.mark.parametrize("argv", [["--no-kill"], ["-k"], ["--requeue"], ["--open-mode=append"]])
def test_options_that_the_script_already_has_are_accepted_and_not_repeated(argv):
    assert not check(scan(argv, ())[0][0])


def test_requeue_modes_of_newer_slurm_and_export_lists_with_all_are_accepted():
    assert all(check(g) for g in scan(["--requeue=other", "--export=ALL,A=1", "--signal=B:USR1@30"], ())[0])


def test_no_option_of_ours_or_sbatchs_is_refused_because_its_name_resembles_another():
    refused = set()
    for option in SBATCH.values():
        try:
            check(Given(option, {"open-mode": "append", "export": "ALL", "signal": "USR2"}.get(option.name)))
        except UsageError:
            refused.add(option.name)
    assert refused == {
        "ntasks", "ntasks-per-gpu", "ntasks-per-node", "ntasks-per-tres",
        "tasks-per-node", "gpus-per-task", "tres-per-task", "no-requeue", "kill-on-bad-exit", "use-min-nodes", "wrap",
    }  # fmt: skip
    assert set(SBATCH) >= COMMAND_LINE_ONLY


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("USR1", "B:USR1@120"),
        ("B:SIGUSR1@30", "B:USR1@30"),
        ("10@60", "B:USR1@60"),
        ("usr1@90", "B:USR1@90"),
        ("sigusr1@90", "B:USR1@90"),
        ("R:USR1@90", "RB:USR1@90"),
        ("BR:10@90", "RB:USR1@90"),
        ("rb:usr1", "RB:USR1@120"),
        ("HUP@0", "B:HUP@0"),
    ],
)
def test_the_warning_signal_always_goes_to_the_batch_shell(text, expected):
    assert str(WarningSignal.parse(text)) == expected
