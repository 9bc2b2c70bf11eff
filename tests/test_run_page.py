"""Pages that are programs: they import what there is, run as printed and show what they draw; and their notebooks."""

import ast
import importlib
import re
from pathlib import Path

import nbformat
import pytest
import run_page
from nbclient.exceptions import CellExecutionError

SECONDS = 180
"""What a page may take of one core, on a quiet machine with two."""
BUSY = 5
"""Times as long a page may take by the wall's clock, where others use the machine too."""

every_program = pytest.mark.parametrize("page", run_page.programs(), ids=lambda page: f"{page.parent.name}/{page.stem}")


@every_program
def test_a_page_names_what_there_is(page: Path) -> None:
    own = {name.removesuffix(".py") for name in run_page.files(page)}
    code = [*run_page.files(page).values(), "\n\n".join(run_page.blocks(page))]
    imported = []
    for node in (node for text in code for node in ast.walk(ast.parse(text, page.name))):
        if isinstance(node, ast.ImportFrom) and node.module not in own:
            module = importlib.import_module(node.module or "")
            for name in node.names:
                assert hasattr(module, name.name) or importlib.import_module(f"{node.module}.{name.name}")
            imported.append(module.__name__)
        elif isinstance(node, ast.Import):
            imported += [importlib.import_module(alias.name).__name__ for alias in node.names if alias.name not in own]
    assert any(name.startswith("textrl_gym") for name in imported)


@every_program
def test_a_page_shows_what_it_printed_and_drew(page: Path) -> None:
    text, code = page.read_text(encoding="utf-8"), "\n\n".join(run_page.blocks(page))
    assert "```text\n" in text
    (figure,) = run_page.figures(page)
    assert f'fig.savefig("{figure}"' in code
    # Words that stand where a result is to be written.
    assert not re.search(r"NUMBERS|RESULT", text)


@pytest.mark.parametrize("folder", run_page.FOLDERS)
def test_images_are_those_of_the_pages(folder: str) -> None:
    images = run_page.DOCS / folder / "images"
    assert sorted(name for page in run_page.pages(folder) for name in run_page.figures(page)) == sorted(
        path.name for path in images.iterdir()
    )
    for path in images.iterdir():
        assert path.stat().st_size < 40_000, f"{path.name}: {path.stat().st_size:,} bytes"


@every_program
def test_tables_have_the_defaults_of_the_code(page: Path) -> None:
    for match in run_page.DEFAULTS.finditer(page.read_text(encoding="utf-8")):
        assert match["table"] == run_page.defaults_table(match["agents"].split()), "run tests/run_page.py on the page"


@every_program
def test_a_notebook_is_its_page(page: Path) -> None:
    made = nbformat.from_dict(run_page.notebook(page))
    nbformat.validate(made)
    assert run_page.notebook(page) == run_page.notebook(page)
    code = [cell.source for cell in made.cells if cell.cell_type == "code"]
    assert [c for c in code if not c.startswith("%%writefile")] == [b.rstrip("\n") for b in run_page.blocks(page)]
    written = dict(c.removeprefix("%%writefile ").split("\n", 1) for c in code if c.startswith("%%writefile"))
    assert written == {name: text.rstrip("\n") for name, text in run_page.files(page).items()}
    drawn = [
        output for cell in made.cells for output in cell.get("outputs", []) if output.output_type == "display_data"
    ]
    assert len(drawn) == 1 and drawn[0].data["image/svg+xml"].lstrip().startswith("<?xml")
    # Beside a notebook there is no documentation, so that no link may lead into it.
    prose = "\n".join(cell.source for cell in made.cells if cell.cell_type == "markdown")
    assert re.findall(r"\]\((?![a-z]+:)[^)]*\)", prose) == []
    assert page.read_text(encoding="utf-8").partition("\n")[0] in prose


def test_notebooks_are_written(tmp_path: Path) -> None:
    run_page.write_notebooks(tmp_path)
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.ipynb"))
    assert names == sorted(str(page.relative_to(run_page.DOCS).with_suffix(".ipynb")) for page in run_page.programs())
    assert nbformat.read(tmp_path / names[0], as_version=4).nbformat == 4


@pytest.mark.slow
@every_program
def test_a_page_runs_as_it_is_printed(page: Path, tmp_path: Path) -> None:
    printed, seconds = run_page.run(page, tmp_path, timeout=SECONDS * BUSY)
    assert seconds < SECONDS
    assert len(printed) == len(run_page.blocks(page)) and any(printed)
    (figure,) = run_page.figures(page)
    assert [path.name for path in tmp_path.glob("*.svg")] == [figure]
    # The same axes and legends as in the figure that is committed; its curves may differ by another machine's digits.
    texts = [
        re.findall(r"<text[^>]*>([^<]*[A-Za-z][^<]*)</text>", (folder / figure).read_text(encoding="utf-8"))
        for folder in (tmp_path, page.parent / "images")
    ]
    assert texts[0] == texts[1] != []


@pytest.mark.slow
@every_program
def test_a_notebook_is_run_by_a_kernel(page: Path, tmp_path: Path) -> None:
    cells = [cell for cell in run_page.execute(page, tmp_path, SECONDS * BUSY) if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    # The figure is a file, as on the page, and stands below the cell that draws it.
    assert [path.name for path in tmp_path.glob("*.svg")] == run_page.figures(page)
    shown = [output for cell in cells for output in cell.outputs if output.output_type == "display_data"]
    assert any("image/png" in output.data for output in shown)


def test_a_page_that_fails_says_why(tmp_path: Path) -> None:
    page = tmp_path / "99-broken.md"
    page.write_text("```python\nprint('begun')\nraise ValueError('why')\n```\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match=r"(?s)99-broken.md failed:.*begun.*ValueError: why"):
        run_page.run(page, tmp_path)


def test_a_kernel_writes_files_prints_and_fails(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    text = '# A page\n\n```python title="mine.py"\nx = 2\n```\n\n```python\nfrom mine import x\n\nprint(x + 1)\n```\n'
    page.write_text(text, encoding="utf-8")
    code = [cell for cell in run_page.execute(page, tmp_path, timeout=60) if cell.cell_type == "code"]
    assert [output["text"] for output in code[1].outputs] == ["3\n"]
    page.write_text(text + "\n```python\nx / 0\n```\n", encoding="utf-8")
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        run_page.execute(page, tmp_path, timeout=60)


def test_a_page_is_printed_again(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        '# A page\n\n```python title="mine.py"\nx = 2\n```\n\n```python\nfrom mine import x\n\nprint(x + 1)\n```\n\n'
        "```text\n7\n```\n\n```python\ny = x\n```\n\n<!-- defaults: random -->\n\nThe end.\n",
        encoding="utf-8",
    )
    run_page.print_again(page)
    text = page.read_text(encoding="utf-8")
    assert "print(x + 1)\n```\n\n```text\n3\n```\n" in text and "7" not in text
    assert text.endswith(
        "```python\ny = x\n```\n\n<!-- defaults: random -->\n\n| setting | `random` |\n| --- | --- |\n\nThe end.\n"
    )
