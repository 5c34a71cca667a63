import pytest

from elastic_hpc.errors import UsageError
from elastic_hpc.job.config import Configuration, load
from elastic_hpc.options.sbatch import SBATCH, Given
from elastic_hpc.options.table import Layer
from elastic_hpc.options.values import NodeRange


@pytest.fixture
def site(tmp_path):
    """Writes configuration files and loads them."""
    return Site(tmp_path)


class Site:
    def __init__(self, folder):
        self.environ = {"ELASTIC_HPC_CONFIG": str(folder / "site.toml"), "XDG_CONFIG_HOME": str(folder / "xdg")}
        self.project = folder / "project"
        self.files = {
            "site": folder / "site.toml",
            "user": folder / "xdg" / "elastic_hpc" / "config.toml",
            "project": self.project / "elastic_hpc.toml",
        }

    def load(self, **texts):
        for name, text in {"site": "", **texts}.items():
            self.files[name].parent.mkdir(parents=True, exist_ok=True)
            self.files[name].write_text(text)
        return load(self.environ, self.project)


def test_later_files_take_precedence_and_every_value_keeps_its_source(site):
    settings = site.load(
        site="max-restarts = 1\nmax-requeues = 1\nheartbeat-timeout = 2.5",
        user="max-restarts = 2\nnodes = '2:4'",
        project="max-restarts = 3",
    )
    assert {name: (str(s.value), s.source) for name, s in settings.options.items()} == {
        "max-restarts": ("3", "./elastic_hpc.toml"),
        "max-requeues": ("1", str(site.files["site"])),
        "heartbeat-timeout": ("0:00:02.500000", str(site.files["site"])),
        "nodes": ("2:4", str(site.files["user"])),
    }


def test_the_command_line_takes_precedence_over_all_files(site):
    settings = site.load(site="nodes = 3\n[sbatch]\npartition = 'a'\nqos = 'b'").with_layer(
        Layer("command line", [("nodes", "1:2")], [Given(SBATCH["partition"], "c")])
    )
    assert settings.options["nodes"].value == NodeRange(1, 2)
    assert [(g.name, g.value) for g in settings.sbatch] == [("qos", "b"), ("partition", "c")]


def test_setup_lines_add_up_and_variables_merge_by_name(site):
    settings = site.load(
        site="setup = ['module load a']\nenv = ['A=1', 'B=1']", project="setup = ['module load b']\nenv = ['B=x=y']"
    )
    assert [line.value for line in settings.setup] == ["module load a", "module load b"]
    assert {name: s.value for name, s in settings.env.items()} == {"A": "1", "B": "x=y"}


def test_sbatch_options_are_strings_numbers_flags_and_unset_by_false(site):
    settings = site.load(
        site="[sbatch]\npartition = 'gpu'\nexclusive = true\nhold = true\n'--from-the-future' = true",
        project="[sbatch]\ngpus-per-node = 8\nhold = false",
    )
    assert [(g.name, g.value) for g in settings.sbatch] == [
        ("partition", "gpu"), ("exclusive", None), ("from-the-future", None), ("gpus-per-node", "8")]  # fmt: skip


def test_a_template_path_is_relative_to_its_file_and_a_name_is_not(site):
    assert site.load(project="template = './my.j2'").options["template"].value == str(site.project / "my.j2")
    assert site.load(project="template = 'torchrun'").options["template"].value == "torchrun"


@pytest.mark.parametrize(("text", "on"), [("true", True), ("false", False), ("'on'", True), ("'off'", False)])
def test_in_a_file_a_switch_is_true_or_false_or_a_word_as_on_the_command_line(site, text, on):
    settings = site.load(site="grow = true\nfree-growth = false", project=f"grow = {text}\nfree-growth = {text}")
    assert [(s.value, s.source) for s in settings.options.values()] == [(on, "./elastic_hpc.toml")] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max-restart = 1", "max-restart: unknown key, did you mean max-restarts?"),
        ("partition = 'gpu'", r"partition: unknown key; it is sbatch's own option: write it under \[sbatch\]"),
        ("slurm = {partition = 'x'}", r"slurm: unknown key, .*sbatch's own options go under \[sbatch\]"),
        ("'a\\nb' = 1", r"'a\\\\nb': unknown key"),
        ('"a\\nb" = 1', r"'a\\nb': unknown key"),
        ("max-restarts = 'x'", "--max-restarts 'x': expected a whole number"),
        ("nodes = '8-4'", "--nodes '8-4': expected N or MIN:MAX"),
        ("nodes = true", "nodes = true: expected a string or a number"),
        ("setup = [1]", r"setup = \[1\]: expected a list of strings, for example setup = \['...'\]$"),
        ("setup = {A = '1'}", "setup = .*: expected a list of strings"),
        ("env = [['A', '1']]", 'expected a list of strings, .*, or a table, for example env = {NAME = "VALUE"}'),
        ("env = {A = true}", "env.A = true: expected a string or a number"),
        ("env = {A = [1, 2]}", r"env.A = \[1, 2\]: expected a string or a number, for example '1,2'"),
        ("[env.A]\nB = '1'", "env.A = .*: expected a string or a number"),
        ("env = {'A=B' = '1'}", "env: 'A=B': expected the name of a variable"),
        ("env = {'1A' = '1'}", "--env '1A=1': expected NAME=VALUE"),
        ("max_restarts = 1\nmax-restarts = 2", "max-restarts: max_restarts is set too; leave out one"),
        ("preload = ['torch', 'x']", "preload = .*: expected a string or a number, for example 'torch,x'"),
        ("log-dir = 2026-01-01", 'expected a string or a number, for example "2026-01-01": without quotes'),
        ("[sbatch]\npartiton = 'x'", r"\[sbatch\] partiton: unknown option of sbatch, did you mean partition\?; an "),
        ("[sbatch]\nnew-one = 'x'", "an option that only a newer sbatch knows is written with its dashes: '--new-one'"),
        ("[sbatch]\npartiton = false", "did you mean partition"),
        ("[sbatch]\nPartition = 'x'", "did you mean partition"),
        ("[sbatch]\n'--' = 'x'", "expected a long option"),
        ("[sbatch]\nmax-restarts = 1", "max-restarts: it is elastic-sbatch's own option: write it above"),
        ("[sbatch]\ntime = 08:00:00", r'time = 08:00:00: .*for example "08:00:00": without quotes TOML reads a time'),
        ("[sbatch]\nexclude = ['n1', 'n2']", "expected a string or a number, for example 'n1,n2'"),
        ("[sbatch.gpu]\npartition = 'x'", "gpu: unknown option of sbatch, did you mean gpus"),
        ("[sbatch.gres]\ngpu = 2", "gres = .*: expected a string or a number"),
        ("[[sbatch]]\npartition = 'x'", r"expected a table, \[sbatch\]"),
        ("env = ['1A=2']", "--env '1A=2': expected NAME=VALUE"),
        ("grow = 1", "grow = 1: expected true or false"),
        ("grow = 'yes'", "--grow 'yes': expected on or off"),
        ("spares = true", "spares = true: expected a string or a number"),
        ("world-multiple-of = 0", "--world-multiple-of '0': expected a whole number, 1 or more"),
        (r'setup = ["a\r\nb"]', "DOS line breaks"),
        ("sbatch = 1", r"expected a table, \[sbatch\]"),
        ("[sbatch]\nntasks = 8", "--ntasks=8: with a task count"),
        ("[sbatch]\nnodes = 8", "above"),
        ("[sbatch]\ntest-only = true", "belongs on the command line"),
        ("[sbatch]\npartition = true", "partition = true: expected a string or a number"),
        ("[sbatch]\nhold = 'x'", "hold = 'x': expected true or false"),
        ("[sbatch]\np = 'gpu'", "p: unknown option of sbatch, did you mean partition"),
        ("[sbatch]\n'a b' = 1", "'a b': unknown option of sbatch"),
        ("not toml", "Expected"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_with_the_files_name(site, text, message):
    with pytest.raises(UsageError, match=rf"(?s)^configuration file \./elastic_hpc\.toml: .*{message}") as caught:
        site.load(project=text)
    assert "\n" not in str(caught.value)


def test_keys_are_written_with_dashes_or_underscores_as_on_the_command_line(site):
    settings = site.load(project="max_restarts = 3\n[sbatch]\ngpus_per_node = 4\ncontainer-name = 'x'")
    assert settings.options["max-restarts"].value == 3
    assert [(g.name, g.value) for g in settings.sbatch] == [("gpus-per-node", "4"), ("container-name", "x")]
    assert site.load(site="[sbatch]\ngpus-per-node = 4", project="[sbatch]\ngpus_per_node = false").sbatch == ()


@pytest.mark.parametrize(
    "text",
    ["env = {A = 'x y', B = 2, C = 0.5}", "[env]\nA = 'x y'\nB = 2\nC = 0.5", "env.A = 'x y'\nenv.B = 2\nenv.C = 0.5"],
)
def test_variables_may_be_a_table_of_strings_and_numbers(site, text):
    settings = site.load(site="env = ['A=1', 'D=1']", project=text)
    assert {name: s.value for name, s in settings.env.items()} == {"A": "x y", "D": "1", "B": "2", "C": "0.5"}


def test_one_string_is_a_list_of_one(site):
    settings = site.load(project="setup = 'module load cuda'\nenv = 'A=1'")
    assert [line.value for line in settings.setup] == ["module load cuda"]
    assert settings.env["A"].value == "1"


def test_a_file_from_a_windows_editor_is_read(site):
    site.load()
    site.project.mkdir(exist_ok=True)
    site.files["project"].write_bytes(b'\xef\xbb\xbfmax-restarts = 3\r\nsetup = """\r\na\r\nb"""\r\n')
    settings = load(site.environ, site.project)
    assert settings.options["max-restarts"].value == 3
    assert settings.setup[0].value == "a\nb"


def test_a_site_file_that_is_named_must_be_readable(site, tmp_path):
    with pytest.raises(UsageError, match=r"configuration file .*site\.toml: No such file"):
        load(site.environ, tmp_path)


def test_a_missing_configuration_is_accepted(tmp_path):
    assert load({"XDG_CONFIG_HOME": str(tmp_path)}, tmp_path) == Configuration()
