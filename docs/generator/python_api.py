"""The page on the Python interface, from the sources: nothing of the package is imported."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import griffe

from generator.markdown import GENERATED, rst

_MODULES = {
    "elastic_hpc": "Submit jobs and follow them; [from Python](../python.md) shows how.",
    "elastic_hpc.training": "For training scripts; [writing one](../training-script.md) shows how.",
    "elastic_hpc.submitit.executors": "submitit's executors; [submitit](../submitit.md) shows how.",
}
_EXECUTORS = ("ElasticExecutor", "ElasticLocalExecutor")


def python_page(root: Path) -> str:
    package = griffe.load("elastic_hpc", search_paths=[str(root)], resolve_aliases=True)
    text = [GENERATED, "# Python\n"]
    for name, summary in _MODULES.items():
        module = package if name == "elastic_hpc" else package[name.removeprefix("elastic_hpc.")]
        text += [f"## {name}\n", f"{summary}\n"]
        for member in module.exports or _EXECUTORS:
            text += _member(module[str(member)], name)
    return "\n".join(text)


def _member(found: griffe.Object | griffe.Alias, module: str) -> Iterable[str]:
    found = found.final_target if isinstance(found, griffe.Alias) else found
    yield f"### {found.name}\n"
    if isinstance(found, griffe.Function):
        yield _signature(f"{module}.{found.name}", found)
        yield from _text(found)
        return
    if not isinstance(found, griffe.Class):
        raise TypeError(f"{module}.{found.name}: expected a class or a function, it is a {found.kind.value}")
    bases = ", ".join(str(base) for base in found.bases)
    init = found.members.get("__init__")
    if isinstance(init, griffe.Function) and "dataclass" not in found.labels:
        yield _signature(f"{module}.{found.name}", init)
    else:
        yield f"```py\nclass {module}.{found.name}" + (f"({bases})" if bases else "") + "\n```\n"
    yield from _text(found)
    public = [
        member for member in found.members.values() if not member.name.startswith("_") or member.name == "__call__"
    ]
    made_by = found.members.get("of")
    if made_by and made_by.docstring:  # the other members are not meant for users who make such an object
        public = [made_by]
    attributes = [member for member in public if isinstance(member, griffe.Attribute)]
    fields = [member for member in attributes if member.annotation is not None and "property" not in member.labels]
    for attribute in fields if _has_fields(found) else ():
        value = "" if attribute.value is None else f" = {attribute.value}"
        about = " ".join(rst(attribute.docstring.value).split()) if attribute.docstring else ""
        yield f"* `{attribute.name}: {attribute.annotation}{value}`" + (f": {about}" if about else "")
    yield ""
    for member in public:
        if not member.docstring:
            continue
        if isinstance(member, griffe.Function):
            yield _signature(member.name, member)
            yield from _text(member)
        elif isinstance(member, griffe.Attribute) and "property" in member.labels:
            yield f"```py\n{member.name}: {member.annotation}\n```\n"
            yield from _text(member)


def _has_fields(found: griffe.Class) -> bool:
    return "dataclass" in found.labels or "NamedTuple" in map(str, found.bases)


def _signature(name: str, function: griffe.Function) -> str:
    """The call, with one parameter per line if it is long."""
    shown: list[str] = []
    star = False
    for parameter in function.parameters:
        if parameter.name in {"self", "cls"}:
            continue
        kind = parameter.kind
        prefix = {
            griffe.ParameterKind.var_positional: "*",
            griffe.ParameterKind.var_keyword: "**",
        }.get(kind, "")
        star = star or prefix == "*"
        if kind is griffe.ParameterKind.keyword_only and not star:
            shown.append("*")
            star = True
        text = f"{prefix}{parameter.name}" + (f": {parameter.annotation}" if parameter.annotation else "")
        shown.append(text + (f" = {parameter.default}" if parameter.default is not None and not prefix else ""))
    returns = f" -> {function.returns}" if function.returns and function.name != "__init__" else ""
    call = f"{name}({', '.join(shown)}){returns}"
    if len(call) > 100:
        call = f"{name}(\n" + "".join(f"    {parameter},\n" for parameter in shown) + f"){returns}"
    return f"```py\n{call}\n```\n"


def _text(found: griffe.Object) -> Iterable[str]:
    if found.docstring:
        yield rst(found.docstring.value)
