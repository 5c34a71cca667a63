"""The help of elastic-sbatch and elastic-srun: made of the tables of their options, as their manuals are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from elastic_hpc.options.table import ElasticOption


@dataclass(frozen=True)
class Manual:
    """What a command says of itself. ``groups``: its options, by the titles above them."""

    usage: str
    description: str
    groups: Mapping[str, Sequence[ElasticOption]]
    notes: str

    def text(self) -> str:
        from textwrap import fill  # which submitting does not need

        parts = [f"usage: {self.usage}\n\n{self.description}"]
        for title, options in self.groups.items():
            parts.append(f"{title}:")
            for option in options:
                value = f"[={option.metavar}]" if option.is_switch else f" {option.metavar}".rstrip()
                parts.append(f"  {', '.join(option.flags)}{value}")
                parts.append(fill(option.help, 110, initial_indent=" " * 8, subsequent_indent=" " * 8))
            parts.append("")
        return "\n".join(parts).rstrip() + "\n" + self.notes.rstrip()
