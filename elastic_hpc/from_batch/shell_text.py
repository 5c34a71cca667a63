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
    """A word as written, with its quotes, or an operator; a line break is an operator."""

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
        """The commands of a list, with the operator in front of each, without redirections."""
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
    parser = _Parser(text)
    for token in tokens(text):
        parser.add(token)
    return parser.finished()


class _Parser:
    """Joins tokens into statements."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._found: list[Statement] = []
        self._held: list[Token] = []  # of the statement that has begun
        self._ends: list[str] = []  # the words that end the open compound commands
        self._compound = False
        self._in_pattern = False  # of a case
        self._function = False  # its body has not begun
        self._is_command = True  # whether a word here would be a command

    def add(self, token: Token) -> None:
        if token.is_word:
            self._add_word(token)
        elif token.text != "\n" or self._held:
            self._add_operator(token)

    def _add_word(self, token: Token) -> None:
        word, opened = token.text, self._ends[-1:]
        self._held.append(token)
        if self._function and word == "{":
            self._ends.append("}")
            self._function, self._is_command = False, True
            return
        if self._is_command and word == "function":
            self._compound = self._function = True
        elif self._is_command and opened == [word]:
            self._ends.pop()
            self._in_pattern = False
        elif self._is_command and word in _OPENS and not self._in_pattern:
            self._ends.append(_OPENS[word])
            self._compound = True
        elif word == "in" and opened == ["esac"]:
            self._in_pattern = True
        self._is_command = (self._is_command and word in _STILL_COMMAND) or self._in_pattern

    def _add_operator(self, token: Token) -> None:
        before = self._held[-1].text if self._held else ""
        if token.text == "(":
            self._compound = True
            self._function = self._function or bool(self._held and self._held[-1].is_word and not self._in_pattern)
            self._ends.append(")")
        elif token.text == ")":
            if self._ends[-1:] == [")"]:
                self._ends.pop()
            self._in_pattern = False
        elif token.text in {";;", ";&", ";;&"}:
            self._in_pattern = True
        self._is_command = not re.search(r"[<>]", token.text)
        ends_here = token.text in {"\n", ";", "&"} and not self._ends and not self._function
        if not ends_here or before in {"&&", "||", "|", "|&"}:
            self._held.append(token)
            return
        if token.text == "&" or token.end - token.begin > 1:  # a here-document belongs to it
            self._held.append(token)
        self._end_statement()
        self._is_command = True

    def _end_statement(self) -> None:
        body = self._text[self._held[0].begin : self._held[-1].end].rstrip("\n")
        line = _line(self._text, self._held[0].begin)
        self._found.append(Statement(body, line, self._compound, tuple(self._held)))
        self._held, self._compound = [], False

    def finished(self) -> list[Statement]:
        """The statements. Raises UsageError if a statement is not closed."""
        if self._ends:
            line = _line(self._text, self._held[0].begin)
            raise UsageError(f"line {line}: expected {self._ends[-1]!r} before the end of the file")
        if self._held:
            self._end_statement()
        return self._found


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
