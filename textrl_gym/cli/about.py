"""`textrl-gym agents`, `env-info` and `completion`: what there is, what it runs on, and the words of a shell."""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import io
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence

from textrl_gym import registry
from textrl_gym.cli.options import flag, parse_flags, positional
from textrl_gym.cli.terminal import make_table, print_rows, print_tables

PACKAGES = (
    *("torch", "transformers", "gymnasium", "stable-baselines3", "tokenizers", "safetensors", "numpy"),
    *("sb3-contrib", "peft", "datasets", "plotly", "trl", "vllm"),
)
"""Whose versions a report of a bug wants to know."""


def version() -> str:
    """The version of this package, as it is installed."""
    return importlib.metadata.version("textrl-gym")


def agents_command(args: Sequence[str]) -> int:
    """List every agent, one row each."""
    parse_flags("agents", agents_command.__doc__, [], args)
    rows = [(path.stem, first_line(path.read_text(encoding="utf-8"))) for path in registry.folder("agents")]
    print_tables(make_table(None, ("agent", "algorithm"), rows, left=("agent", "algorithm"), no_wrap=("agent",)))
    return 0


def first_line(source: str) -> str:
    """The first line of a module's docstring."""
    # Read and not imported: every agent imports torch.
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def env_info_command(args: Sequence[str]) -> int:
    """Print versions, devices and threads, for a report of a bug."""
    parts = [("json", flag(bool, "as JSON"), False)]
    parsed = parse_flags("env-info", env_info_command.__doc__, parts, args)
    facts = environment_facts()
    if parsed.json:
        print(json.dumps(facts, indent=1))
    else:
        print_rows("textrl-gym env-info", facts)
    return 0


def environment_facts() -> dict[str, str]:
    """What this process runs on."""
    facts = {"textrl-gym": version(), "python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[package] = importlib.metadata.version(package)
    import torch

    facts["cores"] = f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}"
    facts["threads"] = f"{torch.get_num_threads()}, between operations {torch.get_num_interop_threads()}"
    facts["cpu capability"] = torch.backends.cpu.get_cpu_capability()
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    facts["gpus"] = ", ".join(gpus) or "none"
    facts["cuda"] = str(torch.version.cuda)
    settings = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "ATEN_CPU_CAPABILITY", "HF_HOME", "HF_HUB_OFFLINE")
    facts |= {name: os.environ[name] for name in settings if name in os.environ}
    return facts


SHELLS = {
    "bash": "complete -o default -C 'textrl-gym completion words' textrl-gym",
    "zsh": "autoload -U +X bashcompinit && bashcompinit\n"
    "complete -o default -C 'textrl-gym completion words' textrl-gym",
}
"""What a shell evaluates: it asks this command for the words, so that new files in agents/ and envs/ are among them."""


def completion_command(commands: Mapping[str, Callable[[Sequence[str]], int]], args: Sequence[str]) -> int:
    """The words of a shell: what it evaluates, and what it asks for then.

    Args:
        commands: name -> command, whose help has its flags.
    """
    if args and args[0] == "words":  # asked by the shell, which says the line so far in the environment
        line = os.environ.get("COMP_LINE", "")[: int(os.environ.get("COMP_POINT", "100000"))]
        print("\n".join(words_for(line, commands)))
        return 0
    shell = positional("SHELL", str, f"one of {', '.join(SHELLS)}")
    parsed = parse_flags("completion", "Print what a shell evaluates to complete words.", [("shell", shell)], args)
    if parsed.shell not in SHELLS:
        raise registry.unknown("shell", parsed.shell, SHELLS)
    print(SHELLS[parsed.shell])
    return 0


def words_for(line: str, commands: Mapping[str, Callable[[Sequence[str]], int]]) -> list[str]:
    """The words that may stand at the end of a line, by its last word so far; none: the shell offers files."""
    try:
        before, last = shlex.split(line), ""
    except ValueError:  # a quotation is open
        return []
    if before and not line.endswith(" "):
        last = before.pop()
    arguments = before[2:]
    if len(before) < 2:
        words = list(commands)
    elif last.startswith("-") and before[1] in commands:
        words = flags_of(commands[before[1]])
    elif (before[1] == "train" and not arguments) or (before[1] == "compare" and "--agents" in arguments):
        words = registry.names("agents")
    else:
        words = sorted(registry.text_envs())
    return [word for word in words if word.startswith(last)]


def flags_of(command: Callable[[Sequence[str]], int]) -> list[str]:
    """The flags of a command, as its help prints them."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        command(["--help"])
    return sorted(set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", printed.getvalue())))


def print_version() -> None:
    """Print the version."""
    print(f"textrl-gym {version()} (Python {sys.version.split()[0]})")
