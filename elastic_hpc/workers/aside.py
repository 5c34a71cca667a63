"""The modules that a standby has imported ahead, kept out of ``sys.modules`` until the script imports them.

At that import, ``Aside`` checks that the modules are as they would be if they were imported now. If they are not, the
process restarts as a fresh process. Imports only what every interpreter has loaded.
"""

import _imp
import _thread
import builtins
import os
import sys
import time
from _frozen_importlib import ModuleSpec, _lock_unlock_module, _module_locks  # type: ignore[attr-defined]
from _frozen_importlib_external import FileFinder, PathFinder

TYPE_CHECKING = False
if TYPE_CHECKING:  # never loaded
    from collections.abc import Callable, Mapping, Sequence
    from types import ModuleType
    from typing import Any

OF_A_ROUND = frozenset(
    (
        *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME"),
        *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
        *("MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "TORCH_NCCL_ASYNC_ERROR_HANDLING"),
        *("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_RUN_ID"),
        *("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_TIMER_FILE"),
        *("ELASTIC_HPC_ROUND", "ELASTIC_HPC_LOCAL_DIR", "ELASTIC_HPC_RANK0_ADDR", "ELASTIC_HPC_FENCE"),
        "SUBMITIT_FOLDER",  # submitit sets this before it loads a function
    )
)
"""Variables of a worker that hold for one round. A standby does not have them when it imports modules ahead; modules
read them later, when a world is formed.
"""

Changes = dict[str, str | None]
"""New values of variables, None for a variable that was removed. A name that ends in ``=`` stands for a variable that
only C libraries see (``os.putenv``), any other name for a variable in ``os.environ``.
"""


def changes(before: dict[str, str], after: dict[str, str]) -> Changes:
    """The changes that turn ``before`` into ``after``."""
    return {name: after.get(name) for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def changed(environ: dict[str, str], by: Changes) -> dict[str, str]:
    """``environ`` with the changes ``by``, without the variables that only C libraries see."""
    return {name: value for name, value in {**environ, **by}.items() if value is not None and name[-1:] != "="}


def set_environ(wanted: dict[str, str]) -> None:
    for name, value in changes(dict(os.environ), wanted).items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


def still_to_make(by_script: Changes, environ: dict[str, str]) -> Changes:
    """The changes of ``by_script`` that ``environ``, and what C libraries see, do not have yet: imports have made the
    others.
    """
    native = getenv_all()
    return {
        name: value
        for name, value in by_script.items()
        if (native.get(name[:-1]) if name[-1:] == "=" else environ.get(name)) != value
    }


def putenv(name: str, value: "str | None") -> None:
    """Set a variable for C libraries alone."""
    if value is None:
        os.unsetenv(name)
    else:
        os.putenv(name, value)


def getenv_all() -> dict[str, str]:
    """The variables as C libraries see them, including those that ``os.environ`` does not have (``os.putenv``)."""
    try:
        posix = _imp.create_builtin(ModuleSpec("posix", None))  # another instance, which reads the variables again
        _imp.exec_builtin(posix)
        return {os.fsdecode(name): os.fsdecode(value) for name, value in posix.environ.items()}
    except Exception:  # noqa: BLE001 - this interpreter has no such module
        return dict(os.environ)


def is_of_python(name: str) -> bool:
    """Whether ``name`` is a module of the standard library, whose import depends on no variable that scripts set."""
    return name.partition(".")[0] in sys.stdlib_module_names or name.startswith("_sysconfigdata_")


def at_import(names: set[str]) -> None:
    """Set what Python's own modules in ``names`` note when they are imported: the time, the working directory."""
    if "logging" in names:
        logging = sys.modules["logging"]
        logging._startTime = time.time_ns() if type(logging._startTime) is int else time.time()  # type: ignore[attr-defined]  # noqa: SLF001
    if "multiprocessing.process" in names:
        sys.modules["multiprocessing.process"].ORIGINAL_DIR = os.getcwd()  # type: ignore[attr-defined]
    if "multiprocessing" in names:
        sys.modules.setdefault("__mp_main__", sys.modules["__main__"])


def remove_finder(finder: object) -> None:
    """Take ``finder`` out of ``sys.meta_path``. The list is replaced, because an import of another thread may be going
    through the list: if this function shortened the list, that import would miss a finder. A finder that a thread adds
    at the same moment may be lost.
    """
    sys.meta_path = [other for other in sys.meta_path if other is not finder]


_OF_IMPORTS = frozenset(
    {
        *("importlib._bootstrap", "importlib._bootstrap_external"),
        *("_frozen_importlib", "_frozen_importlib_external"),  # their names before importlib is imported
    }
)


class _Finding:
    """The import system asks this finder first for every module. The finder provides no module, and notes the name."""

    loading = ""

    def find_spec(self, name: str, *_: object) -> None:
        self.loading = name


class Stage:
    """One import that was made ahead, and its effects."""

    def __init__(self, name: str, by_script: Changes) -> None:
        """``by_script``: what the script did to its variables before it imported ``name``, in an earlier round."""
        self.name, self.by_script = name, by_script
        self.modules: dict[str, ModuleType] = {}
        self.imports: set[tuple[str, str]] = set()
        """Pairs of a module and a module that it has imported, even if the latter was loaded already; without the
        modules that Python's own modules import for others (``pickle``).
        """
        self.sets: Changes = {}
        self.reads: set[str] = set()
        """The variables of a round that the import has read, before a round has given them a value."""
        self.output = (b"", b"")

    def run(self, environ: dict[str, str]) -> dict[str, str]:
        """Import the module. Returns ``environ`` as the import has changed it. Raises what the import raises."""
        loaded, written = set(sys.modules), [os.fstat(number).st_size for number in (1, 2)]
        given = changed(environ, self.by_script)
        set_environ(given)
        putenvs = {name[:-1]: value for name, value in self.by_script.items() if name[-1:] == "="}
        for name, value in putenvs.items():
            putenv(name, value)
        import_, finder = builtins.__import__, _Finding()

        def noting_import(
            name: str,
            globals: "Mapping[str, object] | None" = None,
            locals: "Mapping[str, object] | None" = None,
            fromlist: "Sequence[str] | None" = (),
            level: int = 0,
        ) -> "ModuleType":
            loading = finder.loading
            module = import_(name, globals, locals, fromlist, level)
            finder.loading = loading
            importer = (globals or {}).get("__name__")
            if importer in _OF_IMPORTS:  # a module in C, which is being loaded, imports another
                importer = loading
            if isinstance(importer, str):
                whole = getattr(module, "__name__", name) if level else name
                imported = {(importer, whole), *((importer, f"{whole}.{child}") for child in fromlist or ())}
                self.imports |= {pair for pair in imported if is_of_python(pair[1]) or not is_of_python(importer)}
            return module

        key_of = os.environ.encodekey

        def noting_key(name: str) -> str:
            if name in OF_A_ROUND:
                self.reads.add(name)
            return key_of(name)

        os.environ.encodekey = noting_key
        builtins.__import__ = noting_import
        sys.meta_path.insert(0, finder)
        try:
            __import__(self.name)
        finally:
            os.environ.encodekey = key_of
            builtins.__import__ = import_
            remove_finder(finder)
            for name in putenvs:
                putenv(name, os.environ.get(name))
            self.sets = changes(given, dict(os.environ))
            self.output = (os.pread(1, 1 << 20, written[0]), os.pread(2, 1 << 20, written[1]))
            self.modules = {name: sys.modules[name] for name in list(sys.modules) if name not in loaded}
        return changed(environ, self.sets)


class Aside:
    """A finder that holds the modules. ``sys.meta_path`` begins with it until the script has imported all of these."""

    def __init__(self, stages: list[Stage]) -> None:
        """Take the modules of ``stages`` out of ``sys.modules``."""
        self._stages = stages
        stage_of = {name: stage for stage in stages for name in stage.modules}
        self._held = {}
        """Module, stage and spec by name, in the order in which the imports ended."""
        for name in [name for name in sys.modules if name in stage_of]:
            spec = getattr(sys.modules[name], "__spec__", None)
            if "." in name or spec:
                self._held[name] = sys.modules.pop(name), stage_of[name], spec
        sys.modules.pop("__mp_main__", None)
        order = {name: number for number, name in enumerate(self._held)}
        self._brings = {name: {name.rpartition(".")[0]} for name in self._held}
        """The modules that enter ``sys.modules`` with each module: its package, and the modules that it imports."""
        for stage in stages:
            for importer, imported in stage.imports:
                if importer in self._brings:
                    self._brings[importer].add(imported)
        self._later: dict[str, tuple[ModuleType, str]] = {}
        """Modules that were imported after their package, with the package and their name in it."""
        for name, (module, _, spec) in self._held.items():
            package, _, child = name.rpartition(".")
            if order[name] < order.get(package, 0) or (package in order and not spec):
                self._brings[package].add(name)
            elif package:
                holder = self._held[package][0] if package in self._held else sys.modules.get(package)
                if isinstance(holder, type(sys)) and vars(holder).get(child) is module:
                    self._later[name] = holder, child
                    delattr(holder, child)
        self._given: dict[str, tuple[ModuleType, Stage, ModuleSpec | None]] = {}
        """Modules in ``sys.modules`` that another thread may be importing, because it did not find them there. Until
        then, their ``__spec__`` is None, so that the other thread asks this finder, and does not load the file.
        """
        self._moments: list[tuple[str, Changes]] = []
        self._over = False
        self._lock = _thread.RLock()

    def begin(
        self,
        environ: dict[str, str],
        tell: "Callable[[str, str, list[tuple[str, Changes]]], None]",
        differs: "Callable[[str, list[tuple[str, Changes]]], None]",
    ) -> None:
        """The script starts, with the variables ``environ``.

        ``tell``: called with what happened to the modules, why, and the moments at which the script has imported
        modules. ``differs``: called when a fresh process would have other modules; this call may never return.
        """
        self._environ, self._tell, self._differs = environ, tell, differs
        self._pid, self._path, self._flags = os.getpid(), list(sys.path), sys.getdlopenflags()
        self._native, self._import = getenv_all(), builtins.__import__
        for stage in self._stages:
            if stage.name not in self._held:  # this process has had the module from its beginning
                self._finish(stage)
        if self._held:
            sys.meta_path.insert(0, self)
        self._finders = [finder for finder in sys.path_importer_cache.values() if isinstance(finder, FileFinder)]
        for finder in self._finders:
            self._guard(finder)

    def _guard(self, finder: "Any") -> None:
        """Keep a path's finder, which callers may use without ``sys.meta_path``, from loading a module held here."""
        original = finder.find_spec

        def find_spec(name: str, *rest: object) -> "ModuleSpec | None":
            spec: ModuleSpec | None = original(name, *rest)
            return (self.find_spec(name) or spec) if spec else None

        finder.find_spec = find_spec

    def end(self) -> None:
        """The script has ended: from now on, imports belong to the interpreter's end."""
        self._over = True
        if os.getpid() == self._pid:
            self._tell("warm", "", self._moments)
        del self._tell, self._differs  # they refer to the script, whose objects must be freed as in a fresh process

    def find_spec(self, name: str, *_: object) -> "ModuleSpec | None":
        if (held := self._held.get(name) or self._given.get(name)) is None:
            return None
        module, _stage, found = held
        loader = _Loader(self, name, module, found)
        spec = ModuleSpec(name, loader, origin=getattr(found, "origin", None))  # type: ignore[arg-type]
        spec.submodule_search_locations = getattr(found, "submodule_search_locations", None)
        spec.has_location = getattr(found, "has_location", False)
        return spec

    def note(self, name: str) -> None:
        """The script imports ``name``, which was not imported ahead."""
        if os.getpid() == self._pid and not self._over and not is_of_python(name):
            self._moments.append((name, self._by_script()))
            self._tell("seen", "", self._moments)

    def give(self, name: str) -> None:
        """The script imports ``name``: put the module into ``sys.modules``, with all that its import brought."""
        with self._lock:
            if name in self._held:  # no other thread has imported it
                self._give(name)
            given = list(self._given.items())
        for other, (module, _, spec) in given:
            _lock_unlock_module(other)  # wait until the other thread has imported the module
            _set_spec(module, spec)
            self._given.pop(other, None)
        if not self._held and not self._given:
            for finder in self._finders:
                vars(finder).pop("find_spec", None)
            remove_finder(self)

    def _give(self, name: str) -> None:
        needed = self._needed(name)
        if not self._over and not all(map(is_of_python, needed)):
            by_script = self._by_script()
            self._moments.append((name, by_script))
            if why := self._difference(needed, by_script):
                self._differs(f"{why} before {name} was imported", self._moments)
        for stage in self._stages:
            if stage.name in needed:
                self._finish(stage)
        for other in [other for other in self._held if other in needed]:
            module, _, spec = self._held[other]
            if other in self._later:
                holder, child = self._later.pop(other)
                setattr(holder, child, module)
            if other != name:  # the spec of ``name`` makes other threads wait
                _set_spec(module, None)
            self._given[other] = self._held[other]
            sys.modules.setdefault(other, module)
            del self._held[other]
            if other not in _module_locks:
                _set_spec(module, spec)
                del self._given[other]
        at_import(needed)
        for finder in self._in_front():
            if hasattr(finder, "given"):
                finder.given()

    def _in_front(self) -> "list[Any]":
        """Finders that the import system asks before this one. The import system does not ask them for modules that
        come with another module; then a method ``given`` of such a finder is called.
        """
        return sys.meta_path[: sys.meta_path.index(self)] if self in sys.meta_path else []

    def _finish(self, stage: Stage) -> None:
        self._environ = changed(self._environ, stage.sets)
        set_environ(changed(dict(os.environ), stage.sets))
        self._native = getenv_all()
        for number, rest in enumerate(stage.output, 1):
            while rest:
                rest = rest[os.write(number, rest) :]  # noqa: PLW2901
        if stage.name and os.getpid() == self._pid and not self._over:
            self._tell("warm", "", self._moments)

    def _needed(self, name: str) -> set[str]:
        """The modules that come with ``name``; for the name of a stage, all modules of the stage."""
        stage = self._held[name][1]
        among = self._stages[: self._stages.index(stage) + 1]
        todo, needed = set(stage.modules) if name == stage.name else {name}, set()
        while todo:
            other = todo.pop()
            if other in self._held and self._held[other][1] in among:
                needed.add(other)
                todo |= self._brings[other] - needed
        return needed

    def _by_script(self) -> Changes:
        """The changes that the script has made to its variables so far."""
        by_script = changes(self._environ, dict(os.environ))
        for name, value in changes(self._native, getenv_all()).items():
            if os.environ.get(name) != value:
                by_script[f"{name}="] = value
        return {name: value for name, value in by_script.items() if name.rstrip("=") not in OF_A_ROUND}

    def _difference(self, needed: set[str], by_script: Changes) -> str:
        """Why the modules ``needed`` would differ if they were imported now; empty if they would not."""
        for stage in self._stages:
            if any(name in stage.modules and not is_of_python(name) for name in needed):
                for name in sorted(by_script.keys() | stage.by_script.keys()):
                    value = by_script.get(name, "=")
                    if value != stage.by_script.get(name, "="):
                        how = "left alone" if value == "=" else "removed" if value is None else "set"
                        return f"{name.rstrip('=')} was {how}"
        for name in needed:
            module, _, found = self._held[name]
            if sys.modules.get(name, module) is not module:
                return f"sys.modules[{name!r}] was set"
            if sys.path != self._path and "." not in name and found:
                now = PathFinder.find_spec(name)
                if found.has_location and (not now or now.origin != found.origin):
                    return f"sys.path was changed, which leads to another {name},"
        untouched = self in sys.meta_path and builtins.__import__ is self._import
        if not untouched or not all(hasattr(finder, "given") for finder in self._in_front()):
            return "a hook was set on imports"
        return "sys.setdlopenflags was called" if sys.getdlopenflags() != self._flags else ""


def _set_spec(module: "ModuleType", spec: "ModuleSpec | None") -> None:
    """Set ``__spec__`` of a module that has this attribute, even if the module refuses changes of its attributes."""
    names = getattr(module, "__dict__", None)
    if type(names) is dict and "__spec__" in names:
        names["__spec__"] = spec


class _Loader:
    """The loader of one module that is held."""

    def __init__(self, aside: Aside, name: str, module: "ModuleType", spec: "ModuleSpec | None") -> None:
        self._aside, self._name, self._module, self._spec = aside, name, module, spec

    def create_module(self, _: "ModuleSpec") -> "ModuleType":
        return self._module

    def exec_module(self, module: "ModuleType") -> None:
        self._aside.give(self._name)  # other threads wait, because of the spec that the import system has just set
        _set_spec(module, self._spec)

    def __getattr__(self, name: str) -> object:
        return getattr(self._spec and self._spec.loader, name)
