"""Writes the table of ``docs/causes.md``. Run this program after a change to ``membership/known.py``."""

from __future__ import annotations

from pathlib import Path

from elastic_hpc.membership.known import KNOWN

PAGE = Path(__file__).resolve().parents[2] / "docs/causes.md"
HEAD = "| cause | whose fault | what the job does | what it is, and what helps |\n|---|---|---|---|\n"


def table() -> str:
    rows = (f"| {row.name} | {row.party} | {row.answer} | {row.what.replace('|', '/')} |\n" for row in KNOWN)
    return HEAD + "".join(rows)


def page(text: str) -> str:
    """The page ``text`` with the current table."""
    before, _, rest = text.partition(HEAD)
    return before + table() + "\n" + rest.partition("\n\n")[2]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
