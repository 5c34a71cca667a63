"""The variables of a shell script, as far as they are known without running it. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from elastic_hpc.from_batch.shell_text import tokens

ASSIGNS = re.compile(r"(\w+)(?:\[\w+\])?(\+?=)(.*)", re.DOTALL)
_DECLARES = {"export", "declare", "readonly", "local", "typeset"}


def assigned(words: Sequence[str]) -> list[str]:
    """The assignments of a command that does nothing else; none for other commands."""
    if words[:1] and words[0] in _DECLARES:
        words = [word for word in words[1:] if not re.fullmatch(r"[-+][a-zA-Z]+", word)]
    return list(words) if all(map(ASSIGNS.fullmatch, words)) else []


def names(text: str) -> list[str]:
    """The variables that ``text`` uses: ``$A``, ``${A}``, and in arithmetic ``A``."""
    arithmetic = "".join(re.findall(r"\(\((.*?)\)\)", text, re.DOTALL))
    return re.findall(r"\$\{?[#!]?(\w+)", text) + re.findall(r"[A-Za-z_]\w*", arithmetic)


class Variables:
    """A shell's variables, from assignments in the script and from its environment."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = {k: v for k, v in environ.items() if not k.startswith("SLURM_")}
        self._assigned: dict[str, str] = {}

    def assign(self, text: str) -> None:
        """``text``: NAME=VALUE as written."""
        match = ASSIGNS.fullmatch(text)
        if match and "[" not in text.partition("=")[0]:
            name, how, value = match.groups()
            before = self._assigned.get(name, "") if how == "+=" else ""
            both_lists = before.startswith("(") and value.startswith("(")
            self._assigned[name] = before[:-1] + " " + value[1:] if both_lists else before + value

    def resolve(self, word: str, depth: int = 5) -> str | None:
        """The text to which a shell expands ``word``; None if it is unknown without running the script."""
        found, at, quoted = "", 0, False
        while at < len(word):
            char = word[at]
            if char == '"':
                quoted, at = not quoted, at + 1
            elif char == "'" and not quoted:
                end = word.index("'", at + 1)
                found, at = found + word[at + 1 : end], end + 1
            elif char == "\\":
                keeps = quoted and word[at + 1 : at + 2] not in {"$", '"', "\\", "`"}
                found, at = found + (char if keeps else "") + word[at + 1 : at + 2].replace("\n", ""), at + 2
            elif match := re.compile(r"\$(?:(\w+)|\{(\w+)(?::?-([^{}$]*))?\})").match(word, at):
                value = self._value(match[1] or match[2], depth)
                value = match[3] if value is None else value
                if value is None:
                    return None
                found, at = found + value, match.end()
            elif char in "$`" or (char in "*?[{" and not quoted):
                return None
            elif word.startswith("~/") and at == 0 and "HOME" in self._environ:
                found, at = self._environ["HOME"], 1
            else:
                found, at = found + char, at + 1
        return found

    def _value(self, name: str, depth: int) -> str | None:
        if name == "SLURM_SUBMIT_DIR":
            return self._environ.get("PWD")
        if name in self._assigned:
            return self.resolve(self._assigned[name], depth - 1) if depth else None
        return self._environ.get(name)

    def expand(self, words: Sequence[str], depth: int = 5) -> list[str]:
        """``words`` with the values of variables that hold several words, such as ``$LAUNCHER`` or ``"${args[@]}"``."""
        found: list[str] = []
        for word in words:
            match = re.fullmatch(r'"?\$(?:(\w+)|\{(\w+)(?:\[[@*]\])?\})"?', word)
            value = self._assigned.get(match[1] or match[2], "") if match else ""
            if depth and value[:1] in {'"', "'", "("} and re.search(r"\s|^\(", value):
                inner = value[1:-1]
                if value[0] == '"':
                    inner = re.sub(r'\\(["$`\\])', r"\1", inner)
                found += self.expand([token.text for token in tokens(inner) if token.is_word], depth - 1)
            else:
                found.append(word)
        return found

    def known(self, words: Sequence[str]) -> list[str]:
        """Each word as a shell expands it, if that is known, else as written."""
        return [_bare(word) if (text := self.resolve(word)) is None else text for word in words]


def _bare(word: str) -> str:
    """``"--nnodes=$N"`` without its quotes, so that a scanner sees an option."""
    return word[1:-1] if word[:1] == word[-1:] == '"' and word.count('"') == 2 else word
