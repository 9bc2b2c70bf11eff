"""The documentation: its commands are commands, its Python runs as printed, its links and images are there."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import run_page
from docs_blocks import Block, blocks, commands, pages

from textrl_gym import registry
from textrl_gym.cli import about, main
from textrl_gym.experiments.compare import CompareConfig, run_specs
from textrl_gym.mdp.env_settings import EnvSettings

ROOT = Path(__file__).resolve().parents[1]
PAGES = pages(ROOT)
SHELL = ("sh", "bash", "console", "shell")


def of_language(page: str, *languages: str) -> list[Block]:
    return [block for block in blocks(ROOT, page) if block.language in languages]


@functools.cache
def flags(command: str, agent: str) -> frozenset[str]:
    """What a command's help lists; of `train` with the settings of an agent."""
    if command == "train" and agent == "--resume":
        return frozenset(about.flags_of(lambda args: main.COMMANDS["train"](["--resume", "x", *args])))
    if command == "train" and agent in registry.names("agents"):
        return frozenset(about.flags_of(lambda args: main.COMMANDS["train"]([agent, "CopyText-v0", *args])))
    if command == "labels":
        return frozenset(about.flags_of(lambda args: main.COMMANDS["labels"]([agent, *args])))
    if command == "reward-model":
        measured = about.flags_of(lambda args: main.COMMANDS["reward-model"](["--evaluate", "x", *args]))
        return frozenset([*measured, *about.flags_of(main.COMMANDS["reward-model"])])
    resumed = ("--resume",) if command in ("train", "sft", "reward-model") else ()
    return frozenset([*about.flags_of(main.COMMANDS[command]), *resumed])


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_their_flags_exist(page: str) -> None:
    for block in of_language(page, *SHELL):
        for command, *words in commands(block):
            if command.startswith(("-", "$")):  # --help, a variable
                continue
            where = f"{block.name}: textrl-gym {command} {' '.join(words)}"
            assert command in main.COMMANDS, where
            agent = words[0] if words else ""
            if command == "train" and (":" in agent or not words):  # of the reader's own
                continue
            given = {word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)}
            everywhere = {"--help", "--debug", "--trust-code", "--resume"}
            known = flags(command, "--resume" if "--resume" in given else agent) | everywhere
            unknown = given - known
            assert unknown == set(), where


def test_examples_of_the_help_are_commands() -> None:
    from textrl_gym.cli.options import EXAMPLES

    assert {example.split()[0] for example in EXAMPLES} == set(main.COMMANDS) - {"completion"}
    for example in EXAMPLES.values():
        command, *words = example.split()
        given = {word for word in words if word.startswith("--")}
        assert given <= flags(command, words[0] if words else ""), example
    # The run that is reproduced is one of the comparison in compare's example.
    compared = EXAMPLES["compare"].split()
    out = compared[compared.index("--out") + 1]
    config = CompareConfig(("ppo", "grpo"), seeds=3)
    runs = [f"{out}/runs/{name}" for name in run_specs(compared[1], config, EnvSettings())]
    assert set(config.agents) <= set(compared)
    assert EXAMPLES["reproduce"].removeprefix("reproduce ") in runs


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_compile(page: str) -> None:
    broken = {}
    for block in of_language(page, "python", "py"):
        try:
            compile(block.code, block.name, "exec")
        except SyntaxError as error:
            broken[block.name] = str(error)
    assert broken == {}


# Programs have tests of their own, which look at the figures too.
PROGRAMS = {str(page.relative_to(ROOT)) for page in run_page.programs()}
WITH_PYTHON = [page for page in PAGES if of_language(page, "python", "py") and page not in PROGRAMS]


@pytest.mark.parametrize("page", WITH_PYTHON)
@pytest.mark.slow
def test_python_blocks_run_in_order(page: str, tmp_path: Path) -> None:
    """A page's blocks in one process, in an empty folder, with small budgets."""
    parts = []
    for block in of_language(page, "python", "py"):
        if block.title and not block.why_not:
            (tmp_path / block.title).write_text(block.code, encoding="utf-8")
        elif not block.why_not:
            parts.append(f"# {block.name}\nprint({block.name!r}, flush=True)\n{block.smaller}")
    script = tmp_path / "page.py"
    script.write_text("\n".join(parts), encoding="utf-8")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout[-500:]}\n{done.stderr[-2000:]}"


LINK = re.compile(r"!?\[[^\]]*\]\(([^)#\s]+)(?:#[^)\s]*)?\)")


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_linked_to_are_there(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    targets = {target for target in LINK.findall(text) if not re.match(r"[a-z]+:", target)}
    missing = {target for target in targets if not ((ROOT / page).parent / target).exists()}
    # Pages that docs/_api.py makes; `mkdocs build --strict` knows them.
    assert {target for target in missing if not target.startswith(("../api/", "api/"))} == set()
