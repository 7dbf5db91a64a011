"""What mkdocs does not do by itself: formulas as MathML, and links to files beside docs/.

MathML is drawn by the browser, so pages need no script and no network for their formulas. The
documents link to results and to the README where they lie in the repository; those files become
pages, too.
"""

import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
DOCS = "docs/"
_MOVED = {"README.md": "repository.md"}  # a README is a folder's index, and the site has one
_LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")
_BLOCK = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)
_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_ESCAPES = {"&lt;": "<", "&gt;": ">", "&amp;": "&"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ that pages link to, and those that these link to."""
    seen = {DOCS + file.src_uri for file in files}
    open_ends = [DOCS + file.src_uri for file in files.documentation_pages()]
    while open_ends:
        source = open_ends.pop()
        for target in _linked(source):
            if target in seen or not (ROOT / target).is_file():
                continue
            seen.add(target)
            content = (ROOT / target).read_bytes()
            files.append(File.generated(config, _in_site(target), content=content))
            if target.endswith(".md"):
                open_ends.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links by where their files are in the site; a link to a folder is left as words."""
    here = page.file.src_uri
    back = {site: file for file, site in _MOVED.items()}.get(here, here)
    source = back if (ROOT / back).is_file() else DOCS + here

    def moved(match: re.Match[str]) -> str:
        link, anchor = match.group(1), match.group(2) or ""
        if re.match(r"[a-z]+:", link):
            return match.group(0)
        target = _resolved(source, link)
        if files.get_file_from_path(_in_site(target)) is None:
            return "]()" if (ROOT / target).is_dir() else match.group(0)
        start = posixpath.dirname(here)
        return f"]({posixpath.relpath(_in_site(target), start or '.')}{anchor})"

    return re.sub(r"\[([^\[\]]*)\]\(\)", r"\1", _LINK.sub(moved, markdown))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas, which arithmatex has marked, as MathML."""
    html = _BLOCK.sub(_on_its_own, html)
    return _INLINE.sub(lambda match: convert(_plain(match.group(1))), html)


def _on_its_own(match: re.Match[str]) -> str:
    formula = convert(_plain(match.group(1)), display="block")
    return f'<div style="overflow-x: auto">{formula}</div>'  # scrolls on a narrow screen


def _plain(formula: str) -> str:
    for escape, sign in _ESCAPES.items():
        formula = formula.replace(escape, sign)
    return formula.strip()


def _linked(source: str) -> list[str]:
    """Files of the repository that a Markdown file links to."""
    text = (ROOT / source).read_text(encoding="utf-8")
    links = (match.group(1) for match in _LINK.finditer(text))
    return [_resolved(source, link) for link in links if not re.match(r"[a-z]+:", link)]


def _resolved(source: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _in_site(target: str) -> str:
    """Where a file of the repository is in the site: docs/ is its root."""
    return _MOVED.get(target, target.removeprefix(DOCS))
