"""README's Python blocks run as they are printed, with smaller budgets."""

import re
from pathlib import Path

import pytest

SMALLER = {"200_000": "300", "20_000": "300", "episodes=256": "episodes=8"}
"""Numbers of the README, and those that are tried here."""
NEEDS_NETWORK = "Qwen/Qwen2.5-0.5B"
"""The block that loads this model from the Hub is compiled only; tests/test_models.py loads models of a user."""


def blocks(root: Path) -> list[str]:
    """The Python blocks, in order."""
    return re.findall(r"^```python\n(.*?)^```", (root / "README.md").read_text(), re.M | re.S)


@pytest.mark.parametrize("trained_on", ["CopyText-v0", pytest.param("TLDRSummarize-v0", marks=pytest.mark.slow)])
def test_the_blocks_run_in_order(trained_on: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    namespace: dict[str, object] = {}
    ran = 0
    for number, block in enumerate(blocks(root)):
        for printed, smaller in SMALLER.items():
            block = block.replace(printed, smaller)
        if ".learn(" in block:
            block = block.replace("TLDRSummarize-v0", trained_on)
        code = compile(block, f"README block {number}", "exec")
        if NEEDS_NETWORK in block:
            continue
        if "my_rewards:" in block:  # the text above says that the function stands in my_rewards.py
            (tmp_path / "my_rewards.py").write_text(block[: block.index("env = ")])
        exec(code, namespace)
        ran += 1
    assert ran == len(blocks(root)) - 1 >= 4
    assert (tmp_path / "runs" / "ppo" / "agent.json").is_file()
