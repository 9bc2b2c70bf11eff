"""README's Python blocks run as they are printed, with smaller budgets, in one process and one empty folder."""

from pathlib import Path

import pytest
from docs_blocks import blocks


@pytest.mark.parametrize("trained_on", ["CopyText-v0", pytest.param("TLDRSummarize-v0", marks=pytest.mark.slow)])
def test_the_blocks_run_in_order(trained_on: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    namespace: dict[str, object] = {}
    python = [block for block in blocks(root, "README.md") if block.language == "python"]
    for block in python:
        if block.title:  # a file of the reader's
            (tmp_path / block.title).write_text(block.code)
            continue
        code = block.smaller
        if ".learn(" in code:
            code = code.replace("TLDRSummarize-v0", trained_on)
        exec(compile(code, block.name, "exec"), namespace)
    assert [block.why_not for block in python] == [""] * len(python), "every block of the first page runs"
    assert len(python) == 7
    assert (tmp_path / "runs" / "ppo" / "agent.json").is_file()
