"""The commands of human feedback: `annotate` and `labels`. No torch before the flags are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from textrl_gym.cli.options import Part, env_flags, flag, flat, parse_command, positional
from textrl_gym.web.server import LOOPBACK


def annotate_command(args: Sequence[str]) -> int:
    """Ask people which completions are better, on a page: ENV, a run or comparisons, into a file of labels."""
    from textrl_gym.feedback.questions import AnnotateConfig

    about = "an environment id (or module:Class of a Task), the folder of a run, or comparisons: a file, a folder"
    parts: list[Part] = [
        ("source", positional("ENV|RUN|PAIRS", str, about)),
        ("out", flag(Path, "the file of labels, *.jsonl; one that was begun goes on")),
        ("settings", flat(AnnotateConfig)),
        env_flags(),
        ("host", flag(str, "where to listen; beyond this machine the address has a secret token"), LOOPBACK),
        ("port", flag(int, "0: a free one"), 0),
    ]
    tables = {"settings": "annotate", "env": "env"}
    parsed = parse_command("annotate", annotate_command.__doc__, parts, tables, args)
    from textrl_gym.web import annotate as home

    place = (parsed.host, parsed.port)
    with home.make_server(parsed.source, parsed.out, parsed.settings, parsed.env, *place) as server:
        print(f"{server.address}  (Ctrl-C ends it; the same command goes on)", flush=True)
        server.serve_forever()
    return 0
