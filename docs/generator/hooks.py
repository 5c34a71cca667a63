"""mkdocs' hooks: files outside of docs/ that pages link to become pages too: a link works on the code host and the
site.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

log = logging.getLogger("mkdocs.hooks.links")

_LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)#\s]+)")
_MARK = re.compile(r"^```(\w+) slurm( allocation)?$", re.MULTILINE)  # for tests/slurm/test_documents.py
_FOLDER = "project"  # where those files are in the site
_LANGUAGES = {".py": "py", ".toml": "toml", ".yml": "yaml", ".j2": "jinja", ".sh": "sh"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add all files that pages link to, directly or through other such files."""
    root = _root(config)
    docs = Path(config.docs_dir).relative_to(root).as_posix()
    waiting = [f"{docs}/{file.src_uri}" for file in files.documentation_pages()]
    seen = set(waiting)
    while waiting:
        source = waiting.pop()
        for target in _targets(source, (root / source).read_text()):
            if target in seen or target.startswith(f"{docs}/") or not (root / target).is_file():
                continue
            seen.add(target)
            files.append(File.generated(config, _page_of(target), content=_content(root, target)))
            if target.endswith(".md"):
                waiting.append(target)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point each link to its file's place in the site. mkdocs reports the links that lead nowhere."""
    docs = Path(config.docs_dir).relative_to(_root(config)).as_posix()
    here = page.file.src_uri
    if here.startswith(f"{_FOLDER}/"):
        source = here.removeprefix(f"{_FOLDER}/")
        if not source.endswith(".md") or (not (_root(config) / source).is_file()):
            return markdown  # shown as it is
    else:
        source = f"{docs}/{here}"

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        inside = target.removeprefix(f"{docs}/") if target.startswith(f"{docs}/") else _page_of(target)
        if files.get_file_from_path(inside) is None:
            return match[1]
        return posixpath.relpath(inside, posixpath.dirname(here) or ".")

    return _MARK.sub(r"```\1", _LINK.sub(moved, markdown))


def _root(config: MkDocsConfig) -> Path:
    return Path(str(config.config_file_path)).parent


def _targets(source: str, text: str) -> list[str]:
    """The targets of links in ``source``, by their paths in the checkout."""
    folder = posixpath.dirname(source)
    return [posixpath.normpath(posixpath.join(folder, target)) for target in _LINK.findall(text)]


def _page_of(path: str) -> str:
    return f"{_FOLDER}/{path}" if path.endswith(".md") else f"{_FOLDER}/{path}.md"


def _content(root: Path, path: str) -> str:
    text = (root / path).read_text()
    if path.endswith(".md"):
        return text
    return f"# {path}\n\n````{_LANGUAGES.get(Path(path).suffix, 'text')}\n{text}````\n"
