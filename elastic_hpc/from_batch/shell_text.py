"""The text of a shell script: its statements and words, as far as they are known without running it. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from elastic_hpc.errors import UsageError

_OPERATOR = re.compile(r"&&|\|\||;;&|;;|;&|\|&|&>>|&>|[;&|()]|\d*(?:<<<|<<-?|<>|>>|>\||[<>]&|[<>])")
_OPENS = {"if": "fi", "while": "done", "until": "done", "for": "done", "select": "done", "case": "esac", "{": "}"}
_STILL_COMMAND = {"then", "else", "elif", "do", "!", "time", *_OPENS} - {"for", "select", "case"}


@dataclass(frozen=True)
class Token:
    """A word as it is written, quotes and all, or an operator, line breaks among them."""

    text: str
    is_word: bool
    begin: int
    end: int


@dataclass(frozen=True)
class Statement:
    """A list of commands, or a compound command: a loop, a condition, a function."""

    text: str
    line: int
    compound: bool
    tokens: tuple[Token, ...]

    def parts(self) -> list[tuple[str, list[str]]]:
        """The commands of a list, with the operator in front of each; redirections are left out."""
        found: list[tuple[str, list[str]]] = [("", [])]
        redirected = False
        for token in self.tokens:
            if token.is_word and not redirected:
                found[-1][1].append(token.text)
            elif not token.is_word and token.text in {"&&", "||", "|", "|&", "&", ";"}:
                found.append((token.text, []))
            redirected = not token.is_word and token.text.strip("0123456789")[:1] in {"<", ">"}
            redirected = redirected or (not token.is_word and token.text.startswith("&>"))
        return found


def tokens(text: str) -> Iterator[Token]:
    """The tokens of ``text``. Raises UsageError for quotes and parentheses that are not closed."""
    at = 0
    heredocs: list[str] = []
    wants_delimiter = False
    while at < len(text):
        char = text[at]
        if text.startswith("\\\n", at):
            at += 2
        elif char == "\n":
            end = at + 1
            for delimiter in heredocs:
                end = _after_heredoc(text, end, delimiter)
            heredocs = []
            yield Token("\n", is_word=False, begin=at, end=end)
            at = end
        elif char.isspace():
            at += 1
        elif char == "#":
            at = end if (end := text.find("\n", at)) >= 0 else len(text)
        elif text.startswith("((", at):
            end = _after_parentheses(text, at)
            yield Token(text[at:end], is_word=True, begin=at, end=end)
            at = end
        elif (match := _OPERATOR.match(text, at)) and not re.match(r"[<>]\(", text[at:]):
            yield Token(match[0], is_word=False, begin=at, end=match.end())
            wants_delimiter = match[0].rstrip("-").endswith("<<") and not match[0].endswith("<<<")
            at = match.end()
        else:
            end = _after_word(text, at)
            yield Token(text[at:end], is_word=True, begin=at, end=end)
            if wants_delimiter:
                heredocs.append(re.sub(r"""["'\\]""", "", text[at:end]))
                wants_delimiter = False
            at = end


def statements(text: str) -> list[Statement]:
    """The statements of ``text``, in order, without comments."""
    found: list[Statement] = []
    held: list[Token] = []
    ends: list[str] = []  # of what is open
    compound = in_pattern = function = False
    is_command = True
    for token in tokens(text):
        if token.text == "\n" and not token.is_word and not held:
            continue
        if token.is_word:
            if function and token.text == "{":
                ends.append("}")
                function, is_command = False, True
                held.append(token)
                continue
            if is_command and token.text == "function":
                compound = function = True
            elif is_command and ends[-1:] == [token.text]:
                ends.pop()
                in_pattern = False
            elif is_command and token.text in _OPENS and not in_pattern:
                ends.append(_OPENS[token.text])
                compound = True
            elif token.text == "in" and ends[-1:] == ["esac"]:
                in_pattern = True
            is_command = (is_command and token.text in _STILL_COMMAND) or in_pattern
            held.append(token)
            continue
        before = held[-1].text if held else ""
        if token.text == "(" and held and held[-1].is_word and not in_pattern:
            compound = function = True
            ends.append(")")
        elif token.text == "(":
            compound = True
            ends.append(")")
        elif token.text == ")":
            if ends[-1:] == [")"]:
                ends.pop()
            in_pattern = False
        elif token.text in {";;", ";&", ";;&"}:
            in_pattern = True
        is_command = not re.search(r"[<>]", token.text)
        ends_here = token.text in {"\n", ";", "&"} and not ends and not function
        if ends_here and before not in {"&&", "||", "|", "|&"}:
            if token.text == "&" or token.end - token.begin > 1:  # a here-document belongs to it
                held.append(token)
            found.append(_statement(text, held, compound=compound))
            held, compound, is_command = [], False, True
        else:
            held.append(token)
    if ends:
        raise UsageError(f"line {_line(text, held[0].begin)}: expected {ends[-1]!r} before the end of the file")
    if held:
        found.append(_statement(text, held, compound=compound))
    return found


def _statement(text: str, held: list[Token], *, compound: bool) -> Statement:
    body = text[held[0].begin : held[-1].end].rstrip("\n")
    return Statement(body, _line(text, held[0].begin), compound, tuple(held))


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _after_heredoc(text: str, at: int, delimiter: str) -> int:
    while at < len(text):
        end = end + 1 if (end := text.find("\n", at)) >= 0 else len(text)
        if text[at:end].strip() == delimiter:
            return end
        at = end
    return at


def _after_word(text: str, at: int) -> int:
    while at < len(text):
        char = text[at]
        if char == "(" and text[at - 1] in "=$<>?*+@!":
            at = _after_parentheses(text, at)
        elif re.match(r"[<>]\(", text[at:]):
            at = _after_parentheses(text, at + 1)
        elif char.isspace() or char in ";&|<>()":
            return at
        else:
            at = _after_piece(text, at)
    return at


def _after_piece(text: str, at: int) -> int:
    """The end of what begins at ``at``: a quoted text, a substitution, or one character."""
    char = text[at]
    if char == "\\":
        return at + 2
    if char == "'":
        return _after_quote(text, at, "'", escapes=text[at - 1 : at] == "$")
    if char == "`":
        return _after_quote(text, at, "`", escapes=True)
    if char == '"':
        end = at + 1
        while end < len(text) and text[end] != '"':
            end = _after_piece(text, end) if text[end] in "\\`$" else end + 1
        return _found(text, at, end)
    if text.startswith("$(", at):
        return _after_parentheses(text, at + 1)
    if text.startswith("${", at):
        end = at + 2
        while end < len(text) and text[end] != "}":
            end = _after_piece(text, end)
        return _found(text, at, end)
    return at + 1


def _after_quote(text: str, at: int, quote: str, *, escapes: bool) -> int:
    end = at + 1
    while end < len(text) and text[end] != quote:
        end += 2 if escapes and text[end] == "\\" else 1
    return _found(text, at, end)


def _after_parentheses(text: str, at: int) -> int:
    end, depth = at, 0
    while end < len(text):
        if text[end] in "()":
            depth += 1 if text[end] == "(" else -1
            end += 1
            if depth == 0:
                return end
        elif text[end] == "#" and text[end - 1].isspace():
            end = after if (after := text.find("\n", end)) >= 0 else len(text)
        else:
            end = _after_piece(text, end)
    return _found(text, at, end)


def _found(text: str, at: int, end: int) -> int:
    if end >= len(text):
        raise UsageError(f"line {_line(text, at)}: {text[at : at + 20]!r}: expected its end before that of the file")
    return end + 1
