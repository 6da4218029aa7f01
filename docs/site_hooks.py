"""Hooks of mkdocs: links from docs/ to other files of the repository work on the site as they do in the repository.

`../deploy/Dockerfile.cpu` leads out of docs/, which mkdocs does not publish. Every file that a page links to in this
way is added to the site below `repository/`, Markdown files as pages, and the links are rewritten. Links to folders
become plain text. A link to a file that does not exist stays as it is, and mkdocs warns about it.
"""

import posixpath
import re
from itertools import zip_longest
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

FOLDER = "repository"
_LINK = re.compile(r"(\]\()([^)\s#]+)(?=[)#])")
_FOLDER_LINK = re.compile(r"\[([^\]]*)\]\([^)\s:]*/\)")
_CODE = re.compile(r"(^```.*?^```|`[^`\n]*`)", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ that pages link to, and those that these link to."""
    docs = Path(config.docs_dir)
    root = docs.parent
    waiting = [f"{docs.name}/{file.src_uri}" for file in files.documentation_pages()]
    while waiting:
        source = waiting.pop()
        for target in _targets(root / source):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
            inside = path == docs.name or path.startswith((f"{docs.name}/", ".."))
            if inside or f"{FOLDER}/{path}" in files.src_uris or not (root / path).is_file():
                continue
            files.append(File.generated(config, f"{FOLDER}/{path}", abs_src_path=str(root / path)))
            if path.endswith(".md"):
                waiting.append(path)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links that lead out of docs/, and those that lead back into it."""
    docs = Path(config.docs_dir).name
    here = page.file.src_uri
    source = here.removeprefix(f"{FOLDER}/") if here.startswith(f"{FOLDER}/") else f"{docs}/{here}"

    def rewritten(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        target = path.removeprefix(f"{docs}/") if path.startswith(f"{docs}/") else f"{FOLDER}/{path}"
        if target not in files.src_uris:
            return match[0]
        return match[1] + posixpath.relpath(target, posixpath.dirname(here) or ".")

    parts = _CODE.split(markdown)  # every second part is code
    prose = (_LINK.sub(rewritten, _FOLDER_LINK.sub(r"\1", part)) for part in parts[::2])
    return "".join(text for pair in zip_longest(prose, parts[1::2], fillvalue="") for text in pair)


def _targets(path: Path) -> list[str]:
    """The relative addresses that a page links to, without their anchors."""
    prose = _CODE.sub("", path.read_text(encoding="utf-8"))
    return [target for _, target in _LINK.findall(prose) if "://" not in target]
