"""A module that a standby has imported ahead appears when the script imports it, as if
it were imported at that moment.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from unit.launched import Launch, script

MINE = """
import ctypes, os
getenv = ctypes.CDLL(None).getenv
getenv.restype = ctypes.c_char_p
SEEN = os.environ.get("SET_BY_SCRIPT"), getenv(b"SET_BY_SCRIPT"), os.environ.get("FIRST"), getenv(b"FIRST")
"""


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FIRST", "1")
    script(MINE, "mine.py")
    script("import os\nos.environ['SET_BY_SCRIPT'] = '1'", "settings.py")
    return Launch()


def assert_a_standby_is_as_a_fresh_process(launch: Launch, name: str) -> None:
    """A standby for the script ``name`` that has imported ``mine`` ahead."""
    warm, cold = launch(name, modules=("mine",)), launch(name, warm=False)
    assert (warm.how.warm, warm.code, warm.out, warm.err) == (1, 0, cold.out, "")


def test_a_module_imported_ahead_is_invisible_until_the_script_imports_it_and_then_complete(launch: Launch) -> None:
    folder = Path("family")
    folder.mkdir()
    script("from family import first\nfrom xml import sax", "family/__init__.py")
    script("", "family/first.py")
    script("import family", "family/later.py")
    script("import family.later", "mine.py")
    name = script("""
import sys
def there(): return sorted(name for name in sys.modules if name.startswith(("family", "mine", "xml")))
print(there())
from importlib.util import find_spec
print(find_spec("family").origin, find_spec("family").submodule_search_locations, there())
import family
print(there(), hasattr(family, "later"), family.__spec__, family.__spec__.loader.is_package("family"))
import xml.sax, family.later, mine
print(there(), xml.sax is family.sax, mine.family is family, family.later)
""")
    assert_a_standby_is_as_a_fresh_process(launch, name)


def test_a_module_has_the_submodules_that_it_imports_by_a_dotted_name(launch: Launch) -> None:
    Path("family").mkdir()
    script("", "family/__init__.py")
    script("", "family/later.py")
    script("import family.later, runpy", "other.py")
    script("import family, importlib, other", "mine.py")
    name = script("""
import runpy
print(runpy.importlib.util.__name__)
import other
print(other.family.later.__name__)
""")
    assert_a_standby_is_as_a_fresh_process(launch, name)


@pytest.mark.parametrize(
    "imports",
    [
        "import xml.dom.minidom\nimport family.tail\ndef used(): return xml.dom.minidom.Document, family.tail.VALUE",
        "from xml import dom\nfrom . import tail\ndef used(): return dom.Node, tail.VALUE",
    ],
)
def test_a_submodule_that_the_script_imports_alone_has_all_its_own_imports(imports: str, launch: Launch) -> None:
    """Also imports that other modules had made before."""
    Path("family").mkdir()
    script("", "family/__init__.py")
    script("VALUE = 1", "family/tail.py")
    script(imports, "family/part.py")
    script("import xml.dom.minidom, family.tail, family.part", "mine.py")
    name = script("import family.part\nprint(family.part.used())")
    assert_a_standby_is_as_a_fresh_process(launch, name)


@pytest.mark.parametrize(
    "sets",
    [
        "import os\nos.environ['SET_BY_SCRIPT'] = '1'",
        "import os\nos.environ.update(SET_BY_SCRIPT='1')",
        "import os\nos.environ |= {'SET_BY_SCRIPT': '1'}",
        "import os\nos.environ.setdefault('SET_BY_SCRIPT', '1')",
        "import os\nos.environb[b'SET_BY_SCRIPT'] = b'1'",
        "import os\nos.putenv('SET_BY_SCRIPT', '1')",
        "import ctypes\nctypes.CDLL(None).setenv(b'SET_BY_SCRIPT', b'1', 1)",
        "import os\nos.environ.pop('FIRST')",
        "import os\nos.environ['FIRST'] = '2'",
        "import os\nos.unsetenv('FIRST')",
        "import settings",
    ],
)
def test_variables_that_a_script_sets_before_the_import_hold_in_each_round(sets: str, launch: Launch) -> None:
    """In the first round, the script restarts in a fresh process. The next standbys have imported the module with these
    variables.
    """
    name = script(f"""
import os, subprocess
print(os.environ.get("SET_BY_SCRIPT"), os.environ.get("FIRST"), "SET_BY" in subprocess.getoutput("env"))
{sets}
import mine
print(mine.SEEN, os.getpid() == int(os.readlink("/proc/self")))
""")
    cold = launch(name, warm=False)
    first, second, third = launch.rounds(name, modules=("mine",), count=3)
    variable = "FIRST" if "FIRST" in sets else "SET_BY_SCRIPT"
    assert (first.how.warm, first.how.cold) == (0, 1)
    assert first.how.why.startswith(f"{variable} was")
    assert first.how.why.endswith("before mine was imported")
    assert (second.how.warm, third.how.warm) == (1, 1)
    for ran in (first, second, third):
        assert (ran.code, ran.out, ran.err) == (0, cold.out, cold.err)


def test_each_submodule_appears_at_its_own_import(launch: Launch) -> None:
    script("import os\nSEEN = os.environ.get('SET_BY_SCRIPT')", "part.py")
    script("import part, os\nSEEN = os.environ.get('SET_BY_SCRIPT')", "mine.py")
    name = script("import sys, part, settings\nprint('mine' in sys.modules)\nimport mine\nprint(part.SEEN, mine.SEEN)")
    first, second = launch.rounds(name, modules=("mine",), count=2)
    assert first.out == second.out == "False\nNone 1\n"
    assert (first.how.cold, second.how.warm) == (1, 1)


def test_variables_of_a_round_and_variables_set_after_the_import_change_nothing(launch: Launch) -> None:
    name = script("import os\nos.environ['MASTER_PORT'] = '1'\nimport mine, settings\nprint(os.environ['RANK'])")
    ran = launch(name, modules=("mine",))
    assert (ran.how.warm, ran.out) == (1, "3\n")


def test_variables_of_the_site_reach_the_imports_whatever_their_prefix(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("LOCAL_SCRATCH", "GROUP_HOME", "WORLD_FOO", "ROLE_X", "TORCHELASTIC_SIGNALS_TO_HANDLE")
    for name in names:
        monkeypatch.setenv(name, name)
    script(f"import os\nprint([os.environ[name] for name in {names}], os.environ.get('LOCAL_RANK'))", "mine.py")
    ran = launch(script("import mine"), modules=("mine",), variables={"LOCAL_RANK": "0"})
    assert (ran.how.warm, ran.out) == (1, f"{list(names)} None\n")


@pytest.mark.parametrize(
    ("company", "why"),
    [
        ("import threading, time\nthreading.Timer(2, bool).start()", "the script has started threads"),
        ("import subprocess\nchild = subprocess.Popen(['sleep', '60'])", "the script has started processes"),
        ("import socket\none, other = socket.socketpair()", "the script has opened connections"),
        ("import os\nos.dup2(os.open('log', os.O_RDWR | os.O_CREAT), 1)", "the script has redirected its output"),
        ("from elastic_hpc.training.progress import listen\nlisten()",
         "the script has reported that it listens, or its progress"),
        ("import os\nif pid := os.fork():\n    os.waitpid(pid, 0)\n    os._exit(0)", "this is a child of the worker"),
    ],
)  # fmt: skip
def test_a_script_that_cannot_restart_is_reported_and_the_next_round_is_right(
    company: str, why: str, launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ELASTIC_HPC_LOCAL_DIR", str(tmp_path))
    name = script(f"{company}\nimport settings, mine, sys\nprint(mine.SEEN[0], file=sys.stderr)")
    if "fork" in company:
        first = launch(name, modules=("mine",))
    else:
        first, second = launch.rounds(name, modules=("mine",), count=2)
        assert (first.how.warm, second.how.warm, second.err) == (1, 1, "1\n")
    told, seen = first.err.splitlines()
    assert told == (
        "elastic_hpc: SET_BY_SCRIPT was set before mine was imported, but it had been imported ahead (--preload): "
        f"no effect in this round, as {why}"
    )
    assert seen == "None"


def test_threads_of_a_library_do_not_prevent_a_restart_of_the_script(launch: Launch) -> None:
    """For example threads of BLAS, which scipy and scikit-learn start; scikit-learn also sets variables."""
    name = script("import ctypes, os, time\nlibrary = ctypes.CDLL(None)\nthread = ctypes.c_ulong()\n"
                  "library.pthread_create(ctypes.byref(thread), None, library.pause, None)\n"
                  "assert len(os.listdir('/proc/self/task')) == 2\n"
                  "import settings, mine\nprint(mine.SEEN)")  # fmt: skip
    warm, cold = launch(name, modules=("mine",)), launch(name, warm=False)
    assert (warm.code, warm.out, warm.err) == (cold.code, cold.out, "")
    assert warm.how.cold == 1


def test_the_script_restarts_in_the_state_in_which_it_started(launch: Launch) -> None:
    name = script("""
import os, signal, sys
print(os.getcwd(), os.umask(0o77), signal.getsignal(signal.SIGUSR1), signal.pthread_sigmask(signal.SIG_BLOCK, [10]))
print(sorted(os.listdir("/proc/self/fd")), open("log", "a").write("x"), os.fstat(1).st_size)
print("an error", file=sys.stderr)
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
os.set_inheritable(os.open("log", os.O_RDONLY), True)
os.chdir("/")
import settings, mine
print(mine.SEEN)
""")
    cold = launch(name, warm=False)
    warm = launch(name, modules=("mine",))
    assert (warm.how.cold, warm.code, warm.out, warm.err) == (1, 0, cold.out, "an error\n")


def test_standbys_whose_scripts_always_restart_are_given_up(launch: Launch) -> None:
    name = script(
        "import os\npid = os.environ['SET_BY_SCRIPT'] = str(os.getpid())\nimport mine\nprint(mine.SEEN[0] == pid)"
    )
    rounds = launch.rounds(name, modules=("mine",), count=3)
    assert [ran.out for ran in rounds] == ["True\n"] * 3
    assert [ran.how.why for ran in rounds] == [
        *["SET_BY_SCRIPT was set before mine was imported"] * 2,
        "SET_BY_SCRIPT was set before mine was imported, otherwise in each round",
    ]


FAKE_TORCH = """
import types
cuda = types.SimpleNamespace(is_initialized=lambda: False)
def __getattr__(name):
    import importlib
    return importlib.import_module("torch." + name)
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of installed packages."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


@pytest.mark.parametrize("asks", ["torch._dynamo", "__import__('torch._dynamo')._dynamo"])
def test_modules_that_torch_imports_late_are_imported_ahead_as_the_script_was_seen_to_import_them(
    asks: str, launch: Launch, installed: Path
) -> None:
    (installed / "torch").mkdir()
    script(FAKE_TORCH, f"{installed}/torch/__init__.py")
    script(
        "import os\nDISABLED = os.environ.get('TORCH_COMPILE_DISABLE')\nAHEAD = 'RANK' not in dict(os.environ)",
        f"{installed}/torch/_dynamo.py",
    )
    name = script(
        "import sys, os, torch\nos.environ['TORCH_COMPILE_DISABLE'] = os.environ['FIRST']\n"
        f"print('torch._dynamo' in sys.modules, vars(torch).get('_dynamo'), {asks}.DISABLED, torch._dynamo.AHEAD)"
    )
    first, second, third = launch.rounds(name, modules=("torch",), count=3, learns=True)
    assert first.out == "False None 1 False\n"
    assert second.out == third.out == "False None 1 True\n"
    assert [ran.how.warm for ran in (first, second, third)] == [1, 1, 1]


def test_modules_that_are_imported_late_and_differently_each_time_are_left_to_the_script(
    launch: Launch, installed: Path
) -> None:
    (installed / "torch").mkdir()
    script(FAKE_TORCH, f"{installed}/torch/__init__.py")
    script("import os\nSEEN = os.environ['SET_BY_SCRIPT']", f"{installed}/torch/_dynamo.py")
    name = script(
        "import os, torch\npid = os.environ['SET_BY_SCRIPT'] = str(os.getpid())\nprint(torch._dynamo.SEEN == pid)"
    )
    rounds = launch.rounds(name, modules=("torch",), count=4, learns=True)
    assert [ran.out for ran in rounds] == ["True\n"] * 4
    assert [ran.how.warm for ran in rounds] == [1, 0, 1, 1]


INITIALIZES_CUDA = """
import sys, types
sys.modules["torch"] = types.SimpleNamespace(cuda=types.SimpleNamespace(is_initialized=lambda: True))
"""
AHEAD = "import os\nAHEAD = 'RANK' not in dict(os.environ)"


def test_installed_modules_that_the_script_imports_are_imported_ahead_in_later_rounds(
    launch: Launch, installed: Path
) -> None:
    """Also modules that the script's own modules and functions import, but not its own modules or missing modules."""
    for name in ("first", "second", "third", "brought"):
        script(AHEAD, f"{installed}/{name}.py")
    (installed / "family").mkdir()
    script("import brought", f"{installed}/family/__init__.py")
    script("def late():\n    import third\n    return third.AHEAD", f"{installed}/family/part.py")
    script(f"{AHEAD}\nimport second", "own.py")
    name = script("""
import first, own, family.part
try:
    import nothing_of_this_name
except ImportError:
    pass
print(first.AHEAD, own.second.AHEAD, family.part.late(), family.brought.AHEAD, own.AHEAD)
""")
    rounds = launch.rounds(name, modules=("json",), count=3, learns=True)
    assert [ran.out for ran in rounds] == ["False False False False False\n", *["True True True True False\n"] * 2]
    assert [ran.how.warm for ran in rounds] == [1, 1, 1]
    exactly = launch.rounds(name, modules=("json",), count=2)
    assert [ran.out for ran in exactly] == ["False False False False False\n"] * 2


def test_variables_that_imports_set_do_not_count_as_the_scripts_own(launch: Launch, installed: Path) -> None:
    script("import os\nos.environ.setdefault('SET_BY_IMPORT', '1')", f"{installed}/first.py")
    script("import ctypes\nctypes.CDLL(None).setenv(b'SET_BY_IMPORT_IN_C', b'1', 1)", f"{installed}/second.py")
    script(AHEAD, f"{installed}/third.py")
    name = script("import first, second, third\nprint(third.AHEAD)")
    rounds = launch.rounds(name, modules=("json",), count=3, learns=True)
    assert [ran.out for ran in rounds] == ["False\n", "True\n", "True\n"]
    assert [ran.how.warm for ran in rounds] == [1, 1, 1]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("import os\nos.environ.get('LOCAL_RANK')", "reads LOCAL_RANK, which only a round sets"),
        (
            "import os\nif 'RANK' not in dict(os.environ): raise RuntimeError('no rank')",
            "failed: RuntimeError: no rank",
        ),
        ("import os\nif 'RANK' not in dict(os.environ): os._exit(1)", "ended the process"),
        (INITIALIZES_CUDA, "has initialized CUDA, which belongs to the script"),
    ],
)
def test_a_module_that_cannot_be_imported_ahead_is_named_and_left_to_the_script(
    text: str, why: str, launch: Launch, installed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script(AHEAD, f"{installed}/first.py")
    script(AHEAD, f"{installed}/second.py")
    script(f"{text}\n{AHEAD}", f"{installed}/awkward.py")
    name = script("import first, awkward, second\nprint(first.AHEAD, awkward.AHEAD, second.AHEAD)")
    with caplog.at_level("INFO"):
        rounds = launch.rounds(name, modules=("json",), count=4, learns=True)
    assert rounds[0].out == "False False False\n"
    assert rounds[-1].out == "True False True\n"
    assert rounds[-1].how.warm == 1
    assert {ran.code for ran in rounds} == {0}
    assert caplog.messages == [f"the next standbys do not import awkward ahead: its import {why}"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("import sys\nsys.path.insert(0, 'other')", "sys.path was changed, which leads to another mine, "),
        ("import sys, types\nsys.modules['part'] = types.ModuleType('part')", "sys.modules['part'] was set "),
        ("import sys, os\nsys.setdlopenflags(sys.getdlopenflags() | os.RTLD_GLOBAL)", "sys.setdlopenflags was called "),
    ],
)
def test_an_import_that_would_find_another_module_finds_it(text: str, why: str, launch: Launch) -> None:
    Path("other").mkdir()
    script("import part\nFROM = 'other', part", "other/mine.py")
    script("import part\nFROM = 'here', part", "mine.py")
    script("", "part.py")
    name = script(f"{text}\nimport mine\nprint(mine.FROM)")
    warm, cold = launch(name, modules=("mine",)), launch(name, warm=False)
    assert (warm.out, warm.err, warm.how.why) == (cold.out, cold.err, f"{why}before mine was imported")


def test_at_exit_the_script_imports_the_same_modules_that_were_imported_ahead(launch: Launch) -> None:
    script("import atexit\nprint('imported')\natexit.register(lambda: __import__('mine'))", "mine.py")
    ran = launch(script("import settings, atexit\natexit.register(lambda: print('script'))"), modules=("mine",))
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.count("imported") == 1


def test_a_worker_in_a_process_of_its_own_gets_the_variables_that_the_script_set(launch: Launch) -> None:
    name = script("""
import settings, multiprocessing
def work(queue):
    import mine
    queue.put(mine.SEEN[0])
if __name__ == "__main__":
    for way in ("spawn", "forkserver"):
        context = multiprocessing.get_context(way)
        queue = context.Queue()
        child = context.Process(target=work, args=(queue,))
        child.start()
        print(queue.get(), child.join(), child.exitcode)
""")
    ran = launch(name, modules=("mine",))
    assert ran.out == "1 None 0\n" * 2, ran.err


@pytest.mark.parametrize("name", ["importlib", "functools", "datetime", "inspect", "unittest.mock", "pickle", "ctypes"])
def test_a_module_of_the_standard_library_brings_no_other_modules(name: str, launch: Launch) -> None:
    text = script(f"import {name}, sys\nprint([each for each in sys.modules if each.partition('.')[0] == 'numpy'])")
    warm = launch(text, modules=("numpy",))
    assert (warm.how.warm, warm.code, warm.out, warm.err) == (1, 0, "[]\n", "")


def test_a_module_in_c_has_its_imports(launch: Launch) -> None:
    name = script("import sys, _elementtree\nprint('copy' in sys.modules, _elementtree.XMLParser)")
    warm = launch(name, modules=("xml.etree.ElementTree",))
    assert (warm.how.warm, warm.code, warm.out) == (1, 0, "True <class 'xml.etree.ElementTree.XMLParser'>\n")


HOOK = """
import sys
class Hook:
    def find_spec(self, name, *_):
        print("asked for", name)
sys.meta_path.insert(0, Hook())
"""


REPLACED = """
import builtins
original = builtins.__import__
def replaced(name, *rest):
    if name in ("mine", "tail"):
        print("asked for", name)
    return original(name, *rest)
builtins.__import__ = replaced
"""


ONLY_PATHS = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if isinstance(finder, type)]
print("asked for mine")
print("asked for tail")
"""


@pytest.mark.parametrize("hook", [HOOK, REPLACED, ONLY_PATHS])
def test_a_hook_that_the_script_sets_on_imports_sees_all_of_them(hook: str, launch: Launch) -> None:
    script("import tail\nVALUE = 1", "mine.py")
    script("", "tail.py")
    name = script(f"{hook}import mine\nprint(mine.VALUE)")
    warm, cold = launch(name, modules=("mine",)), launch(name, warm=False)
    assert cold.out == "asked for mine\nasked for tail\n1\n"
    assert (warm.how.cold, warm.how.why) == (1, "a hook was set on imports before mine was imported")
    assert (warm.code, warm.out, warm.err) == (0, cold.out, "")


def test_a_function_run_by_submitit_finds_the_changes_made_to_torch_for_it(launch: Launch) -> None:
    script("import other, tail", "mine.py")
    script("", "tail.py")
    script("", "other.py")
    name = script("import importlib.util, os, sys\nfrom elastic_hpc.submitit.worker import _WhenImported\n"
                  "sys.meta_path.insert(0, _WhenImported('tail', lambda module: print('changed', module.__name__)))\n"
                  "os.environ['SUBMITIT_FOLDER'] = 'x'\nimportlib.util.find_spec('tail')\nimport tail, mine\n"
                  "print(mine.tail.__name__)")  # fmt: skip
    warm, cold = launch(name, modules=("mine",)), launch(name, warm=False)
    assert (warm.how.warm, warm.out, warm.err) == (1, "changed tail\ntail\n", "")
    assert (cold.out, cold.err) == (warm.out, "")


def test_threads_of_the_script_may_import_at_the_same_time(launch: Launch) -> None:
    Path("family").mkdir()
    script("from family import " + ", ".join(f"m{number}" for number in range(200)), "family/__init__.py")
    for number in range(200):
        text = f"import family\nfrom family import m{number // 2}\nVALUE = {number}\nprint('loaded', VALUE)"
        script(text, f"family/m{number}.py")
    script("import family, xml.sax, decimal, wsgiref.handlers, email.mime.text, concurrent.futures.process", "mine.py")
    name = script("""
import sys, threading, importlib
sys.setswitchinterval(1e-6)
names = ["family", "family.m150", "family.m3", "mine", "decimal", "wsgiref.handlers", "email.mime.text", "xml.sax"]
ready = threading.Barrier(len(names))
def load(name):
    ready.wait()
    print(importlib.import_module(name).__name__)
threads = [threading.Thread(target=load, args=(name,)) for name in names]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
import family
print(sum(vars(family)[f"m{number}"].VALUE for number in range(200)))
""")
    for _ in range(10):
        warm = launch(name, modules=("mine",))
        assert (warm.how.warm, warm.code, warm.err) == (1, 0, "")
        assert warm.out.endswith("\n19900\n")
        assert warm.out.count("loaded") == 200


AT_THE_SAME_TIME = """
import _imp, _signal, _socket, sys, threading
class Finder:
    # Holds up the import that another thread makes of ``held_up``, until this thread has been given its modules.
    asked, given_modules = threading.Event(), threading.Event()
    def find_spec(self, name, *_):
        if name == "held_up":
            _imp.release_lock()  # which another thread may take between two finders
            self.asked.set()
            self.given_modules.wait(30)
            _imp.acquire_lock()
    def given(self):
        self.given_modules.set()
def load():
    import held_up
    print(held_up is sys.modules["held_up"], held_up.__spec__.loader is held_up.__loader__, held_up.VALUE)
finder, thread = Finder(), threading.Thread(target=load)
"""


def test_a_thread_in_the_middle_of_an_import_does_not_import_the_module_again(launch: Launch) -> None:
    """Although the module was missing when the thread looked for it, and another thread gets it now."""
    script("print('held_up is loaded')\nVALUE = 1", "held_up.py")
    script("import held_up", "mine.py")
    name = script(f"""{AT_THE_SAME_TIME}
sys.meta_path.insert(0, finder)
thread.start()
assert finder.asked.wait(30)
import mine
thread.join()
print(mine.held_up is sys.modules["held_up"], mine.held_up.__spec__.loader is mine.held_up.__loader__)
""")
    warm = launch(name, modules=("mine",))
    assert (warm.how.warm, warm.code, warm.out, warm.err) == (
        *(1, 0),
        *("held_up is loaded\nTrue True 1\nTrue True\n", ""),
    )


def test_a_thread_in_the_middle_of_an_import_skips_no_finder(launch: Launch) -> None:
    """Although the finder of the modules imported ahead leaves ``sys.meta_path`` meanwhile."""
    script("VALUE = 2", "held_up.py")
    name = script(f"""{AT_THE_SAME_TIME}
finders = len(sys.meta_path)
sys.meta_path.insert(-1, finder)
thread.start()
assert finder.asked.wait(30)
import mine
print(len(sys.meta_path) - finders)
finder.given()
thread.join()
""")
    warm = launch(name, modules=("mine",))
    assert (warm.how.warm, warm.code, warm.out, warm.err) == (1, 0, "0\nTrue True 2\n", "")


def test_a_thread_waits_for_the_import_of_another_thread(launch: Launch) -> None:
    script("print('loaded')\nimport tail", "mine.py")
    script("", "tail.py")
    name = script("""
import os, sys, threading
def load():
    import mine
    print("tail" in sys.modules)
thread, write = threading.Thread(target=load), os.write
def hook(descriptor, data):
    if data == b"loaded\\n":
        thread.start()
        thread.join(1)
    return write(descriptor, data)
os.write = hook
import mine
thread.join()
""")
    warm = launch(name, modules=("mine",))
    assert (warm.how.warm, warm.code, warm.out, warm.err) == (1, 0, "loaded\nTrue\n", "")


def test_a_thread_that_finds_a_module_also_finds_the_effects_of_its_import(launch: Launch) -> None:
    script("import os\nos.environ['SET_BY_IMPORT'] = '1'", "mine.py")
    name = script("""
import os, sys, threading
def load():
    import mine
    print(os.environ.get("SET_BY_IMPORT"))
class Finder:
    def find_spec(self, *_): pass
    def given(self):
        thread = threading.Thread(target=load)
        thread.start()
        thread.join(30)
sys.meta_path.insert(0, Finder())
import mine
""")
    warm = launch(name, modules=("mine",))
    assert (warm.how.warm, warm.code, warm.out, warm.err) == (1, 0, "1\n", "")


def test_a_different_path_to_the_same_modules_makes_no_difference(launch: Launch) -> None:
    """Modules that are built into the interpreter, such as ``math``, are on no path."""
    name = script("import sys\nsys.path.insert(0, 'src')\nsys.path.append('..')\nimport numpy\nprint(numpy.ones(1))")
    ran = launch(name, modules=("numpy",))
    assert (ran.how.why, ran.how.warm, ran.out) == ("", 1, "[1.]\n")
