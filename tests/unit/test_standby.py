"""A standby that gets a round must be indistinguishable from a newly started worker; each test compares the two."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from unit.launched import Launch, run, script, wait_until_ready

from elastic_hpc.workers import folder, standbys
from elastic_hpc.workers.standbys import Standbys

LOOK = """
import sys
modules = [name for name in sys.modules if "json" in name]
import json, os, random, resource, signal, stat, subprocess, sys, threading
me = sys.modules["__main__"]
kinds = {name: type(value).__name__ for name, value in vars(me).items() if name[:2] == "__"}
answer = {
    **{f"sys.{name}": str(getattr(sys, name)) for name in (
        "argv", "orig_argv", "executable", "flags", "warnoptions", "_xoptions", "path", "prefix", "stdin", "stdout",
        "stderr", "excepthook", "displayhook", "path_hooks")},
    "sys.meta_path": [str(finder) for finder in sys.meta_path if not str(finder).startswith("<aside.")],
    "sys.modules": modules, "__mp_main__": "__mp_main__" in sys.modules,
    "streams": [(s.line_buffering, s.write_through, s.isatty(), s.seekable()) for s in (sys.stdout, sys.stderr)],
    "main": {**kinds, "file": getattr(me, "__file__", None), "name": me.__name__, "doc": me.__doc__,
             "package": me.__package__, "spec": str(me.__spec__), "loaded from": getattr(me.__loader__, "path", None),
             "is this": vars(me) is globals()},
    "environ": dict(os.environ),
    "getenv": sorted(str(subprocess.run(["env", "-0"], capture_output=True).stdout).split("\\0")),
    "shown": sorted(filter(None, open("/proc/self/environ").read().split("\\0"))),
    "cwd": os.getcwd(), "umask": os.umask(0o22), "uid": os.getresuid(), "groups": os.getgroups(),
    "handlers": {n: str(signal.getsignal(n)).split(" at ")[0] for n in signal.valid_signals()},
    "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])), "wakeup": signal.set_wakeup_fd(-1),
    "signals": [s for s in open("/proc/self/status").read().split("\\n") if s[:3] == "Sig" and "Q" not in s],
    "limits": [resource.getrlimit(n) for n in range(16)], "nice": os.nice(0), "policy": os.sched_getscheduler(0),
    "cores": sorted(os.sched_getaffinity(0)), "cgroup": open("/proc/self/cgroup").read(),
    "parent": os.getppid(), "leads": [os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid()],
    "open": sorted(f"{n} {stat.S_IFMT(os.fstat(int(n)).st_mode)}" for n in os.listdir("/proc/self/fd")
                   if os.path.exists(f"/proc/self/fd/{n}")),
    "names": [os.path.basename(os.readlink(f"/proc/self/fd/{n}")).split(":")[0] for n in (0, 1, 2)],
    "command": open("/proc/self/cmdline").read().rstrip("\\0"), "comm": open("/proc/self/comm").read(),
    "threads": threading.active_count(), "main thread": threading.current_thread() is threading.main_thread(),
    "tasks": len(os.listdir("/proc/self/task")), "traced": [str(sys.gettrace()), str(sys.getprofile())],
}
print(json.dumps(answer))
"""


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FIRST", "1")
    return Launch()


@pytest.mark.parametrize("how", ["a relative path", "an absolute one", "a link", "a module", "a package"])
def test_a_standby_and_a_new_process_see_the_same_of_themselves(how: str, launch: Launch, tmp_path: Path) -> None:
    folder = tmp_path / "sub folder"
    folder.mkdir()
    script(f'"""Doc."""\n{LOOK}', "sub folder/tr\u00e4in.py")
    (folder / "__main__.py").write_text(LOOK)
    (folder / "__init__.py").write_text("")
    (tmp_path / "package").symlink_to(folder)
    (tmp_path / "link.py").symlink_to(folder / "tr\u00e4in.py")
    arguments = ["--lr", "1e-3", "", "ä \n $x"]
    argv = {
        "a relative path": ["sub folder/tr\u00e4in.py"],
        "an absolute one": [str(folder / "tr\u00e4in.py")],
        "a link": ["link.py"],
        "a module": ["-m", "link"],
        "a package": ["-m", "package"],
    }[how] + arguments
    warm, cold = launch(*argv), launch(*argv, warm=False)
    assert (warm.how.warm, warm.how.cold, warm.how.why) == (1, 0, "")
    assert json.loads(warm.out) == json.loads(cold.out)
    assert (warm.code, warm.err) == (cold.code, cold.err) == (0, "")


@pytest.mark.parametrize(
    "text",
    [
        "import sys\nsys.exit(3)",
        "raise SystemExit('words')",
        "import os\nos._exit(4)",
        "1 +",
        "def f():\n    1 / 0\ntry:\n    f()\nexcept ZeroDivisionError as e:\n    raise RuntimeError('x') from e",
        "raise KeyboardInterrupt",
        "raise ExceptionGroup('two', [ValueError(1), KeyError(2)])" if sys.version_info >= (3, 11) else "raise OSError",
        "import sys\nsys.excepthook = lambda *_: print('hook', sys.last_traceback.tb_frame.f_code.co_filename)\n1/0",
        "import atexit, threading as t\natexit.register(print, 'atexit')\nt.Timer(0.2, print, ['thread']).start()\n1/0",
        "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)",
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nimport time\ntime.sleep(60)",
        "import traceback\nclass C:\n    def __del__(self): print('del')\nc = C()\nprint(__name__, C)",
        "import faulthandler, ctypes\nfaulthandler.enable()\nctypes.string_at(0)",
        "print(input())",
    ],
)
def test_exit_code_and_output_are_the_same_for_every_kind_of_end(text: str, launch: Launch) -> None:
    name = script(text)
    warm, cold = launch(name, "x"), launch(name, "x", warm=False)
    assert warm.how.cold == 0
    assert (warm.code, warm.out) == (cold.code, cold.out)
    if "faulthandler" in text:  # the traceback also shows the frame below the script
        assert warm.err.splitlines()[:5] == cold.err.splitlines()[:5]
    else:
        assert warm.err == cold.err


@pytest.mark.parametrize("how", ["script", "module"])
def test_child_processes_of_a_script_can_import_it(launch: Launch, how: str) -> None:
    name = script(
        """
import cProfile, multiprocessing, os, pickle, sys
from concurrent.futures import ProcessPoolExecutor
class Item:
    pass
def double(item):
    return type(item).__module__, os.getppid() == int(os.environ['PARENT']), sys.argv, item
if __name__ == "__main__":
    os.environ['PARENT'] = str(os.getpid())
    assert pickle.loads(pickle.dumps(Item())).__class__ is Item
    for way in ("fork", "spawn", "forkserver"):
        with ProcessPoolExecutor(1, multiprocessing.get_context(way)) as pool:
            *said, item = pool.submit(double, Item()).result()
            print(way, said, type(item) is Item)
    with cProfile.Profile() as profile:
        double(Item())
    codes = [entry.code for entry in profile.getstats() if hasattr(entry.code, "co_name")]
    print([code.co_filename for code in codes if code.co_name == "double"])
"""
    )
    argv = ["-m", "train"] if how == "module" else [name]
    warm, cold = launch(*argv, modules=("concurrent.futures.process",)), launch(*argv, warm=False)
    assert (warm.how.warm, warm.code, warm.out, warm.err) == (1, cold.code, cold.out, cold.err)
    assert warm.out.count("__mp_main__") == 2


def test_data_loaders_can_fork_and_spawn(launch: Launch) -> None:
    name = script(
        """
import torch
from collections import namedtuple
from torch.utils.data import DataLoader
Pair = namedtuple("Pair", "a b")
def collate(items):
    return Pair(torch.tensor(items), "b")
if __name__ == "__main__":
    for way in ("fork", "spawn"):
        loader = DataLoader([1, 2, 3], 2, collate_fn=collate, num_workers=1, multiprocessing_context=way)
        print(way, [(type(pair) is Pair, pair.a.tolist()) for pair in loader])
"""
    )
    ran = launch(name, modules=("torch",))
    assert ran.code == 0, ran.err  # on a busy machine Python's resource tracker may print a warning here
    assert ran.out == "fork [(True, [1, 2]), (True, [3])]\nspawn [(True, [1, 2]), (True, [3])]\n"
    assert ran.how.warm == 1


def test_random_numbers_differ_unless_they_have_a_seed(launch: Launch) -> None:
    name = script(
        "import random, numpy, torch\nprint(random.random(), numpy.random.rand(), hash('x'), torch.initial_seed())\n"
        "torch.manual_seed(1)\nprint(torch.rand(2).tolist(), torch.get_num_threads(), torch.__config__.parallel_info())"
    )
    first, second, cold = (launch(name, modules=("torch",), warm=warm) for warm in (True, True, False))
    assert first.how.warm == 1
    free, fixed = zip(*(ran.out.split("\n", 1) for ran in (first, second, cold)), strict=True)
    assert all(len(set(column)) == 3 for column in zip(*map(str.split, free), strict=True))
    assert len(set(fixed)) == 1


def test_the_whole_stack_can_be_shown_without_waiting(launch: Launch) -> None:
    """Each frame's file is read; no such file may be a descriptor of the script."""
    name = script("import os, traceback\npipes = [os.pipe() for _ in range(50)]\ntraceback.print_stack()")
    ran = launch(name)
    assert (ran.code, ran.how.warm) == (0, 1)
    assert ran.err.endswith("in <module>\n    traceback.print_stack()\n")


def test_output_and_settings_of_an_import_come_with_it(launch: Launch) -> None:
    script(
        "import os, warnings\nwarnings.warn('old')\nprint('said')\nos.environ['SET'] = os.environ['FIRST'] + "
        "os.environ.get('RANK', '')\nos.environ['FIRST'] = 'by import'",
        "mine.py",
    )
    name = script("import mine, os\nprint(os.environ['SET'], os.environ['FIRST'], os.environ['RANK'])")
    ran = launch(name, modules=("mine",))
    assert (ran.out, ran.how.warm) == ("said\n1 by import 3\n", 1)
    assert "UserWarning: old" in ran.err


@pytest.mark.parametrize(
    ("why", "how"),
    [
        ("LD_LIBRARY_PATH has changed", {"variables": {"LD_LIBRARY_PATH": "/x"}}),
        ("--preload nothing_of_this_name: ModuleNotFoundError: No module named 'nothing_of_this_name'",
         {"modules": ("nothing_of_this_name",)}),
        ("--preload mine: SystemExit: 5", {"modules": ("mine",)}),
        ("--preload gpu has initialized CUDA, which belongs to the script", {"modules": ("gpu", "torch")}),
        ("the output is no file", {"pipe": True}),
        ("the script is no plain file", {"archive": True}),
        ("the script is no plain file", {"missing": True}),
    ],
)  # fmt: skip
def test_a_standby_that_would_differ_becomes_a_fresh_process(why: str, how: dict[str, object], launch: Launch) -> None:
    script("print('imported')\nraise SystemExit(5)", "mine.py")
    script("import types, sys\nsys.modules['torch'] = types.SimpleNamespace(cuda=types.SimpleNamespace(\n"
           "    is_initialized=lambda: True))", "gpu.py")  # fmt: skip
    name = script(LOOK)
    if how.pop("archive", False):
        with zipfile.ZipFile("train.zip", "w") as archive:
            archive.writestr("__main__.py", LOOK)
        name = "train.zip"
    if how.pop("missing", False):
        name = "missing.py"
    warm, cold = launch(name, **how), launch(name, warm=False, **{k: v for k, v in how.items() if k != "modules"})
    assert (warm.how.warm, warm.how.cold, warm.how.why) == (0, 1, why)
    assert (warm.code, warm.out, warm.err) == (cold.code, cold.out, cold.err)


def test_a_standby_that_is_killed_while_it_waits_is_not_used(tmp_path: Path) -> None:
    pool = Standbys(["train.py"], ["json"], 2)
    pool.prepare()
    first, second = (each.process for each in pool._waiting)
    first.kill()
    first.wait()
    with (tmp_path / "out").open("w") as out:
        assert pool.take([sys.executable, "-u", "train.py"], {}, [out.fileno()] * 2) is second
        assert pool.take([sys.executable, "-u", "train.py"], {}, [out.fileno()] * 2) is None
    second.wait()
    pool.close()
    assert (pool.started.cold, pool.started.why) == (1, "no standby was ready")


def test_the_agents_own_path_is_not_changed() -> None:
    code = "import sys; sys.path.insert(0, 'mine'); import elastic_hpc.workers.standbys; assert sys.path[0] == 'mine'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_next_standbys_start_one_by_one_while_the_workers_train(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Standbys(["train.py"], ["json"], 3)
    for count in (1, 2, 3):
        pool.look(going=True)
        pool.look(going=True)  # no further standby before the last one is ready
        assert len(pool._waiting) == count
        wait_until_ready(pool)
    pool.look(going=True)
    assert len(pool._waiting) == 3
    assert pool.started.standby_mb > 1
    pool.close()


def test_standbys_take_only_a_part_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Standbys(["train.py"], ["json"], 2)
    pool.look(going=True)
    wait_until_ready(pool)
    needed = 2 * pool.started.standby_mb
    monkeypatch.setattr("elastic_hpc.workers.memory.available", lambda: needed / standbys.SHARE * 0.99)
    pool.look(going=True)
    assert len(pool._waiting) == 1
    monkeypatch.setattr("elastic_hpc.workers.memory.available", lambda: needed / standbys.SHARE * 1.01)
    pool.look(going=True)
    assert len(pool._waiting) == 2
    pool.close()


def test_after_three_deaths_no_further_standbys_are_started() -> None:
    pool = Standbys(["train.py"], ["json"], 1)
    for _ in range(3):
        pool.look(going=True)
        pool._waiting[0].process.kill()
        pool._waiting[0].process.wait()
    pool.look(going=True)
    pool.look(going=True)
    assert not pool._waiting
    assert pool.take([sys.executable, "-u", "train.py"], {}, [1, 2]) is None
    assert pool.started.why == "standbys died while they waited, 3 times"


def test_a_standby_starts_in_the_current_working_directory_of_its_agent(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [str(tmp_path / script("import os\nprint(os.getcwd())"))]
    pool = Standbys(argv, ["json"], 1)
    pool.prepare()
    wait_until_ready(pool)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    ran = run(pool, argv, warm=True)
    pool.close()
    assert (ran.out, ran.err, ran.how.warm) == (f"{tmp_path / 'other'}\n", "", 1)


def test_a_standby_finds_a_recreated_working_directory(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "_remembered", "")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    folder.remember()
    work.rmdir()
    work.mkdir()
    (work / "train.py").write_text("import os\nprint(os.getcwd())")
    pool = Standbys(["-m", "train"], ["json"], 1)
    pool.prepare()
    wait_until_ready(pool)
    ran = run(pool, ["-m", "train"], warm=True)
    pool.close()
    assert (ran.out, ran.err, ran.how.warm) == (f"{work}\n", "", 1)


def test_a_standby_whose_agent_is_gone_ends() -> None:
    pool = Standbys(["train.py"], ["json"], 1)
    pool.prepare()
    pool._waiting[0].close()
    pool._waiting[0].process.wait(30)


def test_signals_reach_the_worker_and_all_its_children(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    os.mkfifo(tmp_path / "output" / "fifo")
    name = script(
        "import subprocess, time\nchild = subprocess.Popen(['sleep', '60'])\n"
        "open('output/fifo', 'w').write('x')\nchild.wait()\nprint(child.returncode)\ntime.sleep(60)"
    )
    assert launch(name, kill=signal.SIGTERM).code == -signal.SIGTERM


def test_a_worker_that_is_kept_for_the_next_round_keeps_writing_into_its_own_record(launch: Launch) -> None:
    Path("a").touch()
    name = script("import os, time\nwhile os.path.exists('a'):\n    time.sleep(0.01)\nimport json\n")
    pool = Standbys([name], ("json",), 1)
    pool.prepare()
    wait_until_ready(pool)
    with open(os.devnull, "w") as null:
        worker = pool.take([sys.executable, "-u", name], os.environ, [null.fileno(), null.fileno()])
    assert worker
    pool.begin(kept={worker.pid})
    others = [os.memfd_create("other") for _ in range(20)]  # one of them would get the number of a closed record
    Path("a").unlink()
    assert worker.wait(60) == 0
    assert [os.fstat(other).st_size for other in others] == [0] * 20
    for other in others:
        os.close(other)
    pool.close()
