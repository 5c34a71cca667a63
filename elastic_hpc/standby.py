"""A worker before its round: the interpreter has started and the modules of ``--preload`` are imported, then it waits
for its place in a world. Run by path (``elastic_hpc.standbys``), and only of what every interpreter has loaded anyway.

What runs then must not be told from a process that was started at that moment. Where that cannot be had, it is one:
this process replaces itself by it (exec), under the same pid.
"""

fresh = dict(globals())  # what the interpreter gives to a script

import marshal  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402

if __name__ == "__main__" and not getattr(sys.flags, "safe_path", False):
    del sys.path[0]  # the folder of this file
import _signal  # type: ignore[import-not-found]  # noqa: E402
import _socket  # noqa: E402

SOCKET = "ELASTIC_HPC_STANDBY"
"""Number of the descriptor that leads to the agent, and blanks: room for the variables below."""
OF_A_ROUND = ("RANK", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "TORCH_NCCL_ASYNC_ERROR_HANDLING")
PREFIXES = ("LOCAL_", "GROUP_", "ROLE_", "WORLD_", "TORCHELASTIC_", "ELASTIC_HPC_")
"""Variables that may become known after the imports: they are read when a world is formed."""


def is_of_a_round(name: str) -> bool:
    return name in OF_A_ROUND or name.startswith(PREFIXES)


class Gently:
    """Rests twice as long as each import took, until this worker is wanted: of one core it takes a third.

    A niceness would do more, but nobody without privileges gets rid of it again.
    """

    def __init__(self, agent: _socket.socket) -> None:
        self._agent = agent
        self._spent = time.process_time()
        self.wanted = False

    def find_spec(self, *_: object) -> None:
        """Asked first for every module: it has none."""
        if self.wanted:
            return
        self._agent.settimeout(max(0.0001, 2 * (time.process_time() - self._spent)))
        try:
            self._agent.recv(1, _socket.MSG_PEEK)
            self.wanted = True
        except TimeoutError:
            pass
        self._agent.settimeout(None)
        self._spent = time.process_time()


def private_megabytes() -> float:
    """Memory of this process that no other shares."""
    try:
        with open("/proc/self/smaps_rollup", "rb") as file:
            return sum(int(line.split()[1]) for line in file if line.startswith(b"Private_")) / 1024
    except OSError:  # all of it is more, which is the safe side
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024**2


def with_luck(module: str) -> None:
    """Import it; the script would be the one to tell that it does not work."""
    try:  # noqa: SIM105 - contextlib may be one of the script's own
        __import__(module)
    except Exception:  # noqa: BLE001, S110
        pass


def preload(modules: list[str], guess: str, agent: _socket.socket, *, gently: bool) -> str:
    """Import ``modules``; the answer is why that does not do, or empty. ``guess``: one more, if there is the time."""
    gentle = Gently(agent)
    if gently:
        sys.meta_path.insert(0, gentle)
    name = ""
    try:
        for name in modules:
            __import__(name)
        if gently and guess and not gentle.wanted:
            with_luck(guess)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the script will show it
        return f"--preload {name}: {type(error).__name__}: {error}"
    finally:
        if gentle in sys.meta_path:
            sys.meta_path.remove(gentle)
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        return f"--preload {','.join(modules)} has initialized CUDA, which belongs to the script"
    return ""


def receive(agent: _socket.socket) -> tuple[tuple[int, int], dict[str, str]]:
    """Wait to be wanted: descriptors for stdout and stderr, and the environment."""
    data, ancillary, _, _ = agent.recvmsg(16, _socket.CMSG_SPACE(3 * 4))
    if not data:
        os._exit(0)  # the agent is gone
    descriptors = ancillary[0][2]
    out, err, memory = (int.from_bytes(descriptors[i : i + 4], sys.byteorder) for i in (0, 4, 8))
    environ = marshal.loads(os.pread(memory, os.fstat(memory).st_size, 0))  # noqa: S302 - of the same interpreter
    os.close(memory)
    return (out, err), environ


def is_plain(path: str) -> bool:
    """Whether ``path`` is a script, rather than a folder or an archive that has one."""
    with open(path, "rb") as file:
        return file.read(2) != b"PK"


def obstacle(argv: list[str], started_with: dict[str, str], environ: dict[str, str], outputs: tuple[int, int]) -> str:
    """Why a fresh process would be another one; empty if it would not."""
    for name in started_with.keys() | environ.keys():
        if started_with.get(name) != environ.get(name) and not is_of_a_round(name):
            return f"{name} has changed"
    if any(os.fstat(output).st_mode >> 12 != os.fstat(1).st_mode >> 12 for output in outputs):
        return "the output is no file"
    if argv[0] != "-m" and not (os.path.isfile(argv[0]) and is_plain(argv[0])):
        return "the script is no plain file"
    return ""


def redirect(outputs: tuple[int, int], *, repeat: bool) -> None:
    """Write to ``outputs`` from now on; ``repeat``: first what was written up to now."""
    for number, output in enumerate(outputs, 1):
        said = os.pread(number, os.fstat(number).st_size, 0)
        os.dup2(output, number)
        os.close(output)
        while said and repeat:
            said = said[os.write(number, said) :]


def show(command: list[str], environ: dict[str, str]) -> None:
    """Have ``ps`` and ``/proc`` show ``command``, and the variables of ``environ`` that came late: they overwrite what
    this process was started with, where room was left for them.
    """
    try:
        with open("/proc/self/stat", "rb") as file:
            arguments, after, variables = map(int, file.read().rpartition(b")")[2].split()[45:48])
        with open("/proc/self/environ", "rb") as file:
            block = file.read()
        room = block.index(SOCKET.encode() + b"=")
        end = block.index(b"\0", room) + 1
        late = [f"{name}={value}" for name, value in environ.items()]
        memory = os.open("/proc/self/mem", os.O_WRONLY)
        try:
            for address, size, words in ((arguments, after - arguments, command), (variables + room, end - room, late)):
                content = b"".join(os.fsencode(word) + b"\0" for word in words)
                os.pwrite(memory, content[: size - 1].ljust(size, b"\0"), address)
        finally:
            os.close(memory)
    except (OSError, ValueError):
        pass


def prepare() -> tuple[str | tuple[bytes, str], dict[str, object]]:
    """Everything until the script may run: its code and namespace; no code for a module."""
    agent = _socket.socket(fileno=int(os.environ.pop(SOCKET)))
    started_with = dict(os.environ)
    argv, modules, guess, gently = marshal.loads(agent.recv(1 << 20))  # noqa: S302 - of the same interpreter
    command = [*sys.orig_argv[: sys.orig_argv.index(sys.argv[0])], *argv]
    is_module = argv[0] == "-m"
    sys.argv = ["-m", *argv[2:]] if is_module else list(argv)
    sys.orig_argv = command
    if not getattr(sys.flags, "safe_path", False):
        sys.path.insert(0, os.getcwd() if is_module else os.path.dirname(os.path.realpath(argv[0])))
    why = preload(modules, guess, agent, gently=gently)
    agent.send(f"ready {private_megabytes():.1f}".encode())
    outputs, environ = receive(agent)
    why = why or obstacle(argv, started_with, environ, outputs)
    redirect(outputs, repeat=not why)
    agent.send(f"cold {why}"[:1000].encode() if why else b"warm")
    agent.close()
    if why:
        for number in (_signal.SIGPIPE, _signal.SIGXFSZ):  # what Python ignores would stay ignored
            _signal.signal(number, _signal.SIG_DFL)
        os.execve(sys.executable, command, environ)  # noqa: S606 - the worker itself
    for name in started_with.keys() - environ.keys():
        os.environ.pop(name, None)
    late = {name: value for name, value in environ.items() if started_with.get(name) != value}
    os.environ.update(late)  # what the imports themselves have set stays
    show(command, late)
    main = type(sys)("__main__")
    main.__dict__.update(fresh, __doc__=None)
    sys.modules["__main__"] = main
    if is_module:
        del main.__file__, main.__cached__
        return argv[1], main.__dict__
    path = os.path.abspath(argv[0])
    main.__file__, main.__loader__ = path, type(fresh["__loader__"])("__main__", path)
    with open(path, "rb") as file:
        source = file.read()
    return (source, path), main.__dict__


if __name__ == "__main__":
    itself = sys.modules["__main__"]
    what, namespace = prepare()
    try:
        if isinstance(what, str):
            import runpy

            runpy._run_module_as_main(what)  # type: ignore[attr-defined]  # noqa: SLF001 - what python -m does
        else:
            exec(compile(*what, "exec", dont_inherit=True), namespace)  # noqa: S102 - what python does
    except SystemExit:
        raise
    except BaseException as error:
        hook, shown = sys.excepthook, error.__traceback__ and error.__traceback__.tb_next

        def without_this_file(kind: type[BaseException], value: BaseException, _: object) -> None:
            """Show the traceback as if the script had been started."""
            sys.excepthook, sys.last_traceback = hook, shown
            hook(kind, value.with_traceback(shown), shown)

        sys.excepthook = without_this_file
        raise
