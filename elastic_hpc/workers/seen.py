"""Which installed modules a script imports, seen while it runs, so that the next standbys import these modules ahead.
Imports only what every interpreter has loaded.
"""

import sys
from _frozen_importlib_external import PathFinder

TYPE_CHECKING = False
if TYPE_CHECKING:  # never loaded
    from _frozen_importlib import ModuleSpec
    from collections.abc import Callable

_INSTALLED = {"site-packages", "dist-packages"}


def is_installed(spec: "ModuleSpec | None") -> bool:
    """Whether the module was installed, by pip for example. A script's own files may change from round to round."""
    places = spec and (spec.origin, *(spec.submodule_search_locations or ()))
    return any(_INSTALLED.intersection(place.split("/")) for place in places or () if place)


class Seen:
    """A finder of ``sys.meta_path`` that has no module. It notes the names of the modules that the script imports, and
    names that a function of a package imports when the script calls the function (``DistributedDataParallel`` imports
    ``torch._dynamo``), but not the names that installed modules import while they are loaded.
    """

    def __init__(self, note: "Callable[[str], None]") -> None:
        self._note = note

    def find_spec(self, name: str, *_: object) -> None:
        frame = sys._getframe(1)  # noqa: SLF001
        while frame := frame.f_back:  # type: ignore[assignment]
            code = frame.f_code
            loading = code.co_name == "_load_unlocked" and code.co_filename.startswith("<frozen importlib")
            if loading and is_installed(frame.f_locals["spec"]):
                return
        if is_installed(PathFinder.find_spec(name.partition(".")[0])):
            self._note(name)
