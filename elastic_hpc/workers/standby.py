"""A standby: a process that becomes a worker when a round starts. Before that it starts Python, imports the modules of
``--preload``, and waits, so that the round does not wait for these imports.

The agent runs this file by its path (``workers.standbys``). The file imports only modules that every interpreter has
loaded anyway, and two modules beside it: ``aside`` hides the preloaded modules until the script imports them, and
``seen`` notes what else the script imports.

The script must find no difference from a process that was started for the round. Where there would be a difference, for
example because the script or the agent has changed a variable, the standby replaces itself by a fresh process (exec),
under the same pid.
"""

fresh = dict(globals())  # as the interpreter gives it to a script

import marshal  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402

loaded = set(sys.modules)
import _signal  # type: ignore[import-not-found]  # noqa: E402
import _socket  # noqa: E402
import _thread  # noqa: E402

SAFE_PATH = sys.flags.isolated or getattr(sys.flags, "safe_path", False)

if __name__ == "__main__":
    folder = os.path.dirname(__file__)
    sys.path.insert(0, folder)
    import aside  # type: ignore[import-not-found]
    import seen  # type: ignore[import-not-found]

    del sys.path[: 1 if SAFE_PATH else 2], sys.path_importer_cache[folder]
    del sys.modules["aside"], sys.modules["seen"]
else:
    from elastic_hpc.workers import aside, seen

SOCKET = "ELASTIC_HPC_STANDBY"
"""The variable with the number of the descriptor that leads to the agent, and with blanks: room for later variables."""


class Gently:
    """Pauses after each import for twice the time that the import took, until this worker is wanted. So the standby
    uses a third of one core. A process without privileges could not take a niceness back.
    """

    def __init__(self, agent: _socket.socket) -> None:
        self._agent = agent
        self._spent = time.process_time()
        self.wanted = False

    def find_spec(self, *_: object) -> None:
        """The import system asks this finder first for every module. The finder pauses, and provides no module."""
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
    """Memory that this process shares with no other process, in MiB."""
    try:
        with open("/proc/self/smaps_rollup", "rb") as file:
            return sum(int(line.split()[1]) for line in file if line.startswith(b"Private_")) / 1024
    except OSError:  # the resident memory is larger, which is on the safe side
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024**2


def preload(
    plan: list[tuple[str, aside.Changes, bool]], agent: _socket.socket, *, gently: bool
) -> tuple[list[aside.Stage], str, dict[str, str]]:
    """Import the modules of ``plan``. Returns what was imported; why the imports cannot be used, empty if they can; and
    the optional modules that later standbys should not import, each with the reason.

    ``plan``: for each module its name, the changes that the script makes to its variables before it imports the module,
    and whether the module is optional: an optional module is left out if the agent wants this worker meanwhile, and if
    its import fails.
    """
    unfit: dict[str, str] = {}
    gentle = Gently(agent)
    if gently:
        sys.meta_path.insert(0, gentle)
    environ, own = dict(os.environ), aside.Stage("", {})
    own.modules = {name: sys.modules[name] for name in ("_signal", "_socket") if name not in loaded}
    stages = [own]
    try:
        for name, by_script, optional in plan:
            if optional and gentle.wanted:
                continue
            if optional:
                tell_agent(agent, "importing", name)
            stage = aside.Stage(name, aside.still_to_make(by_script, environ))
            stages.append(stage)
            try:
                environ = stage.run(environ)
            except (Exception, SystemExit) as error:  # noqa: BLE001
                if not optional:
                    return stages, f"--preload {name}: {type(error).__name__}: {error}", unfit
                unfit[name] = f"failed: {type(error).__name__}: {error}"
            if optional and stage.reads:
                unfit[name] = f"reads {' and '.join(sorted(stage.reads))}, which only a round sets"
                return stages, f"{name} {unfit[name]}", unfit
            if cuda_is_initialized():
                unfit[name] = "has initialized CUDA, which belongs to the script"
                return stages, f"{'' if optional else '--preload '}{name} {unfit[name]}", unfit
    finally:
        aside.remove_finder(gentle)
    return stages, "", unfit


def cuda_is_initialized() -> bool:
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    return cuda is not None and bool(cuda.is_initialized())


def tell_agent(agent: _socket.socket, *what: str | float | dict[str, str]) -> None:
    """Send ``what`` unless the agent does not read."""
    try:  # noqa: SIM105 - the script may have a contextlib of its own
        agent.send(marshal.dumps(what), _socket.MSG_DONTWAIT)
    except OSError:
        pass


def receive(agent: _socket.socket) -> tuple[tuple[int, int], dict[str, str]]:
    """Wait until the agent wants this worker. Returns descriptors for stdout and stderr, and the environment."""
    data, ancillary, _, _ = agent.recvmsg(16, _socket.CMSG_SPACE(3 * 4))
    if not data:
        os._exit(0)  # the agent is gone
    descriptors = ancillary[0][2]
    out, err, memory = (int.from_bytes(descriptors[i : i + 4], sys.byteorder) for i in (0, 4, 8))
    environ = marshal.loads(os.pread(memory, os.fstat(memory).st_size, 0))  # noqa: S302 - of the same interpreter
    os.close(memory)
    return (out, err), environ


def is_plain(path: str) -> bool:
    """Whether ``path`` is a script, not an archive with a script in it."""
    with open(path, "rb") as file:
        return file.read(2) != b"PK"


def obstacle(argv: list[str], started_with: dict[str, str], environ: dict[str, str], outputs: tuple[int, int]) -> str:
    """Why a fresh process would differ from this process; empty if it would not."""
    for name in started_with.keys() | environ.keys():
        if started_with.get(name) != environ.get(name) and name not in aside.OF_A_ROUND:
            return f"{name} has changed"
    if any(os.fstat(output).st_mode >> 12 != os.fstat(1).st_mode >> 12 for output in outputs):
        return "the output is no file"
    if argv[0] != "-m" and not (os.path.isfile(argv[0]) and is_plain(argv[0])):
        return "the script is no plain file"
    return ""


class Process:
    """This process at the moment when its script starts, so that it can restart as a fresh process."""

    def __init__(self, command: list[str], environ: dict[str, str]) -> None:
        self._command, self._environ = command, environ
        self._pid, self._folder, self._umask = os.getpid(), os.getcwd(), os.umask(0o22)
        os.umask(self._umask)
        self._threads, self._files = _thread._count(), self._open()  # noqa: SLF001 - threads of libraries hold no work
        self._outputs = [(os.fstat(number), os.lseek(number, 0, os.SEEK_CUR)) for number in (1, 2)]
        self._ignored = [n for n in _signal.valid_signals() if _signal.getsignal(n) == _signal.SIG_IGN]
        self._blocked = _signal.pthread_sigmask(_signal.SIG_BLOCK, [])

    @staticmethod
    def _open() -> dict[str, str]:
        found = {}
        for number in os.listdir("/proc/self/fd"):
            try:  # noqa: SIM105 - the script may have a contextlib of its own
                found[number] = os.readlink(f"/proc/self/fd/{number}")
            except OSError:
                pass
        return found

    def witness(self) -> str:
        """What would reveal that the script restarts; empty if nothing would."""
        if os.getpid() != self._pid:
            return "this is a child of the worker"
        if _thread._count() > self._threads:  # noqa: SLF001
            return "the script has started threads"
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            return "the script has started processes"
        except ChildProcessError:
            pass
        opened = [what for number, what in self._open().items() if self._files.get(number) != what]
        if any(what.startswith("socket:") for what in opened):
            return "the script has opened connections"
        if not all(os.path.samestat(os.fstat(number), was) for number, (was, _) in enumerate(self._outputs, 1)):
            return "the script has redirected its output"
        meeting = self._environ.get("ELASTIC_HPC_LOCAL_DIR", "=") + "/"
        if any(what.startswith(meeting) for what in opened):  # elastic_hpc.training keeps a file open
            return "the script has reported that it listens, or its progress"
        return ""

    def begin_again(self) -> None:
        """Become a fresh process, by exec. Removes the output of the script so far."""
        for number, (_, length) in enumerate(self._outputs, 1):
            os.ftruncate(number, length)
            os.lseek(number, length, os.SEEK_SET)
        for descriptor in self._open().keys() - self._files.keys():
            try:  # noqa: SIM105
                os.set_inheritable(int(descriptor), False)  # noqa: FBT003
            except OSError:
                pass
        os.chdir(self._folder)
        os.umask(self._umask)
        for signal in _signal.valid_signals():
            if _signal.getsignal(signal) == _signal.SIG_IGN and signal not in self._ignored:
                _signal.signal(signal, _signal.SIG_DFL)
        _signal.pthread_sigmask(_signal.SIG_SETMASK, self._blocked)
        become_fresh(self._command, self._environ)


def become_fresh(command: list[str], environ: dict[str, str]) -> None:
    for number in (_signal.SIGPIPE, _signal.SIGXFSZ):  # signals that Python ignores would stay ignored
        _signal.signal(number, _signal.SIG_DFL)
    os.execve(sys.executable, command, environ)  # noqa: S606 - the worker itself


def show(command: list[str], environ: dict[str, str]) -> None:
    """Have ``ps`` and ``/proc`` show ``command``, and the variables ``environ`` of the round: overwrite the memory with
    the arguments and variables that this process was started with, where the agent has left room.
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


def prepare() -> tuple[str | tuple[bytes, str], dict[str, object], aside.Aside]:
    """Everything before the script runs. Returns the script's source and path, or the name of a module; its namespace;
    and the modules held for it.
    """
    agent = _socket.socket(fileno=int(os.environ.pop(SOCKET)))
    started_with = dict(os.environ)
    argv, plan, learns, record, gently = marshal.loads(agent.recv(1 << 20))  # noqa: S302 - of the same interpreter
    command = [*sys.orig_argv[: sys.orig_argv.index(sys.argv[0])], *argv]
    is_module = argv[0] == "-m"
    sys.argv = ["-m", *argv[2:]] if is_module else list(argv)
    sys.orig_argv = command
    if not SAFE_PATH:
        sys.path.insert(0, os.getcwd() if is_module else os.path.dirname(os.path.realpath(argv[0])))
    stages, why, unfit = preload(plan, agent, gently=gently)
    held = aside.Aside(stages)
    tell_agent(agent, "ready", private_megabytes(), why, unfit)
    outputs, environ = receive(agent)
    agent.close()
    parent = os.getppid()
    try:  # noqa: SIM105 - the script may have a contextlib of its own
        os.chdir(f"/proc/{parent}/cwd")  # as a process that the agent starts now
    except OSError:
        pass

    def tell(what: str, why: str, moments: list[tuple[str, aside.Changes]]) -> None:
        """Write into the agent's record of this worker, if the agent lives. Keeps no descriptor open."""
        try:
            if os.getppid() == parent:
                written = os.open(f"/proc/{parent}/fd/{record}", os.O_WRONLY | os.O_APPEND)
                os.write(written, marshal.dumps((what, why, moments)))
                os.close(written)
        except OSError:
            pass

    why = why or obstacle(argv, started_with, environ, outputs)
    for number, output in enumerate(outputs, 1):
        os.dup2(output, number)
        os.close(output)
    if why:
        tell("cold", why, [])
        become_fresh(command, environ)
    os.environ.clear()  # in the order of a fresh process
    os.environ.update(environ)
    show(command, {name: value for name, value in environ.items() if started_with.get(name) != value})
    main = type(sys)("__main__")
    main.__dict__.update(fresh, __doc__=None)
    sys.modules["__main__"] = main
    process = Process(command, environ)

    def differs(why: str, moments: list[tuple[str, aside.Changes]]) -> None:
        witness = process.witness()
        if not witness:
            tell("cold", why, moments)
            process.begin_again()
        message = (
            f"elastic_hpc: {why}, but it had been imported ahead (--preload): no effect in this round, as {witness}\n"
        )
        os.write(2, message.encode(errors="replace"))
        tell("late", why, moments)

    if learns:
        sys.meta_path.insert(0, seen.Seen(held.note))
    held.begin(environ, tell, differs)
    if is_module:
        del main.__file__, main.__cached__
        return argv[1], main.__dict__, held
    path = os.path.abspath(argv[0])
    sys.path_importer_cache[path] = sys.path_importer_cache.pop(__file__, None)
    main.__file__, main.__loader__ = path, type(fresh["__loader__"])("__main__", path)
    with open(path, "rb") as file:
        source = file.read()
    return (source, path), main.__dict__, held


if __name__ == "__main__":
    itself = sys.modules["__main__"]
    what, namespace, held = prepare()
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
    finally:
        held.end()
