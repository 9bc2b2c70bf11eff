"""MkDocs hook: pages made of other files (the changelog, CONTRIBUTING), and a notebook for each program."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import run_page  # noqa: E402 - beside the tests, which run the pages

OF_ROOT = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "README.md": "index.md"}
"""Files of the repository's root -> their pages."""


def of_root(name: str) -> str:
    """A file of the root with links that are right among the pages."""
    text = (
        (ROOT / name)
        .read_text(encoding="utf-8")
        .replace("](docs/", "](")
        .replace("[Apache-2.0](LICENSE)", "Apache-2.0")
    )
    for file, page in OF_ROOT.items():
        text = text.replace(f"]({file})", f"]({page})")
    return text


def on_files(files: Files, config: Any) -> Files:
    """Add what is made."""
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        files.append(File.generated(config, OF_ROOT[name], content=of_root(name)))
    for page in run_page.programs():
        name = str(page.relative_to(run_page.DOCS).with_suffix(".ipynb"))
        files.append(File.generated(config, name, content=json.dumps(run_page.notebook(page), indent=1)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Behind the title of a program, a link to its notebook."""
    path = run_page.DOCS / page.file.src_uri
    # The page itself first: most pages are of the API, and finding all programs reads many files.
    if path.parent.name not in run_page.FOLDERS or path not in run_page.pages(path.parent.name):
        return markdown
    title, _, rest = markdown.partition("\n")
    return f"{title}\n\n[This page as a notebook]({path.stem}.ipynb)\n{rest}"


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """The corner of a table that has no words is no heading; a screen reader would announce an empty one."""
    return html.replace("<th></th>", "<td></td>")
