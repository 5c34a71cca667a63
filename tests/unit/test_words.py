"""The words of help texts, messages, events and documents: each pattern below has made readers stumble."""

from __future__ import annotations

import ast
import re
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
SOURCES = ("elastic_hpc", "docs/generator", "bin/mini_slurm")
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def texts() -> Iterator[tuple[str, int, str]]:
    """File, line and text: the documents without their code, and the strings of the sources, but for docstrings."""
    for path in DOCUMENTS:
        text = CODE.sub(lambda match: "\n" * match[0].count("\n") or "X", path.read_text())
        for number, line in enumerate(text.splitlines(), 1):
            yield str(path.relative_to(ROOT)), number, line
    for path in sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")):
        tree = ast.parse(path.read_text())
        statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in statements:
                yield str(path.relative_to(ROOT)), node.lineno, node.value


def test_help_messages_and_documents_use_plain_words() -> None:
    found = [
        f"{path}:{line}: {match[0]!r}: write {instead}"
        for path, line, text in texts()
        for pattern, instead in INSTEAD.items()
        if (match := re.search(pattern, text, re.IGNORECASE))
    ]
    assert not found, "\n".join(found)
