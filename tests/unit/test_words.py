"""The words of help texts, messages, documents, comments and test names: readers stumbled over each pattern below."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
INSTEAD = {
    r"\b(go|goes|going|went) on\b": "continue, resume",
    r"\bin touch\b": "connected",
    r"\btak(e|es|en|ing) (\w+ )?for (?!granted)": "declare, believe",
    r"\b(is|are|was|were|be|been) asked for\b": "A requests B, with the one who requests as the subject",
    r"(?<!cannot )\btells?\b": "says, reports, shows, explains",
    r"\bis told\b|\bare told\b|\bwas told\b|\bwere told\b": "gets, is notified, is asked",
    r"\bow(e|es|ed)\b": "must",
    r"\bheed(s|ed)?\b": "handle, watch",
    r"\bnothing heard\b": "no heartbeat",
    r"\bagain and again\b": "repeatedly",
    r"\bdone again\b": "repeated",
    r"\bto be had\b": "available",
    r"\bnot over\b": "active",
    r"\bdeeds?\b": "action",
    r"\bcould not be asked\b": "did not answer",
    r"\banew\b": "again",
    r"\bfor ever\b": "without limit",
    r"\bwhence\b": "from where, the source",
    r"\b(no|some|every)body\b": "the one who does it: a user, a job, a process",
    r"\bfor good\b": "permanently",
}
"""Patterns, and what to write instead."""
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("elastic_hpc", "docs/generator", "bin", "benchmarks", "examples", "slurm_templates", "tests")
MESSAGES = ("elastic_hpc/", "docs/generator/", "bin/")
"""Folders whose strings are help texts, messages and events."""
OTHER_FILES = ("bin/*", "docs/generator/engine.*", "slurm_templates/*")
"""Scripts and templates, which are not ``*.py``."""
CODE = re.compile(r"^```.*?^```$|``[^`]*``|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def texts() -> Iterator[tuple[str, int, str]]:
    """File, line and text of the documents, and of the prose in the sources."""
    files = {path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    files |= {path for pattern in OTHER_FILES for path in ROOT.glob(pattern) if path.is_file()}
    for path in [*DOCUMENTS, *sorted(files)]:
        name, text = str(path.relative_to(ROOT)), path.read_text()
        if path.suffix == ".py" or re.match("#!.*python", text):
            yield from ((name, *found) for found in prose(text, strings=name.startswith(MESSAGES)))
        else:
            text = CODE.sub(lambda match: "\n" * match[0].count("\n") or "X", text)
            yield from ((name, number, line) for number, line in enumerate(text.splitlines(), 1))


def prose(source: str, *, strings: bool) -> Iterator[tuple[int, str]]:
    """Line and text of comments, docstrings, names of tests and, with ``strings``, of all other strings."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and (strings or id(node) in docstrings):
            yield node.lineno, CODE.sub("X", node.value) if id(node) in docstrings else node.value
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test_"):
            yield node.lineno, node.name.replace("_", " ")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], CODE.sub("X", token.string)


def test_documents_messages_comments_and_names_of_tests_use_plain_words() -> None:
    found = [
        f"{path}:{line}: {match[0]!r}: write {instead}"
        for path, line, text in texts()
        for pattern, instead in INSTEAD.items()
        if (match := re.search(pattern, " ".join(text.split()), re.IGNORECASE))
    ]
    assert not found, "\n".join(found)
