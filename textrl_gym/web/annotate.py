"""The annotation page over HTTP: a prompt and its completions, blind, one choice after the other.

The page is one file without a request to elsewhere. /view gives what an annotator is asked now, /answer writes what
they chose, /undo takes it back; each answers with what comes next. An answer is on the disk before /answer says so.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from textrl_gym.data.labels import Item
from textrl_gym.feedback.answers import LabelFile, Session
from textrl_gym.feedback.questions import AnnotateConfig, questions_for
from textrl_gym.mdp.env_settings import EnvSettings
from textrl_gym.web.server import LOOPBACK, PageServer, Reply, content_security_policy, json_reply

POLL_SECONDS = 1.0
INSTRUCTIONS = """\
You see a prompt and several answers to it. Choose the answer that you would rather be given: the one that is true, \
does what the prompt asks for, and is clear. Longer is not better by itself.

The answers are shown in a random order, and nothing says who wrote them. If you cannot decide, say that it is a tie. \
Skip what you do not understand. You can take an answer back.
"""


def page(instructions: str, annotators: tuple[str, ...]) -> tuple[str, str]:
    """The page, and the Content-Security-Policy that lets its own script and style run and nothing else."""
    parts = {name: _asset(f"page.{name}") for name in ("html", "css", "js")}
    # "<" is escaped, so that no text of the instructions ends the script element.
    settings = json.dumps({"instructions": instructions.strip(), "annotators": annotators}).replace("<", "\\u003c")
    html = parts["html"].replace("/*STYLE*/", parts["css"]).replace("/*SCRIPT*/", parts["js"])
    html = html.replace("/*SETTINGS*/", settings)
    return html, content_security_policy(_hash(parts["js"]), _hash(parts["css"]))


def _asset(name: str) -> str:
    return (resources.files("textrl_gym") / "assets" / "annotate" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """How a Content-Security-Policy names an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


class AnnotateServer(PageServer):
    """Serves the page of one session."""

    def __init__(self, session: Session, host: str, port: int) -> None:
        self.session = session
        config = session.config
        html, policy = page(read_instructions(config), config.annotators)
        super().__init__(
            host,
            port,
            {"/": lambda: Reply(html.encode(), "text/html")},
            {
                "/view": lambda asked: json_reply(session.view(asked.get("annotator"))),
                "/answer": lambda asked: json_reply(session.answer(asked)),
                "/undo": lambda asked: json_reply(session.undo(asked.get("annotator"))),
            },
            policy,
        )

    def server_close(self) -> None:
        """Let another process write the labels too."""
        super().server_close()
        self.session.file.close()


def read_instructions(config: AnnotateConfig) -> str:
    """What annotators read first.

    Raises:
        ValueError: the file cannot be read.
    """
    if config.instructions is None:
        return INSTRUCTIONS
    try:
        return config.instructions.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"instructions {str(config.instructions)!r} cannot be read: {error}") from error


def make_server(
    source: str,
    out: Path,
    config: AnnotateConfig | None = None,
    env: EnvSettings | None = None,
    host: str = LOOPBACK,
    port: int = 0,
) -> AnnotateServer:
    """A server that is bound and not yet serving; it goes on with a file of labels that was begun.

    Args:
        source: what is asked; see `textrl_gym.feedback.questions.questions`.
        out: the file of labels, *.jsonl.

    Raises:
        ValueError: nothing to ask, other settings than the file was begun with, or another process writes it.
        OSError: the port is taken, or the host is no address of this machine.
    """
    config = config or AnnotateConfig()
    if out.suffix != ".jsonl":
        raise ValueError(f"out must be a file *.jsonl, got {str(out)!r}")
    read_instructions(config)  # before models are loaded
    items = questions_for(out, source, config, env)
    file = LabelFile(out)
    try:
        return AnnotateServer(Session(items, file, config), host, port)
    except BaseException:
        file.close()
        raise


def serve_until_answered(items: Sequence[Item], out: Path, config: AnnotateConfig, host: str, port: int) -> None:
    """Serve questions until each has its answers; those that are in the file already are not asked again.

    Args:
        items: what is asked.
        out: the file of labels.
        config: how; its `n` and what questions are made of are not read.

    Raises:
        ValueError, OSError: as of `make_server`.
    """
    file = LabelFile(out)
    session = Session(items, file, config)
    if session.is_answered():
        file.close()
        return
    with AnnotateServer(session, host, port) as server:
        print(f"{server.address}  ({len(items)} questions; Ctrl-C stops, and the same command goes on)", flush=True)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            while not session.is_answered():
                time.sleep(POLL_SECONDS)
            time.sleep(POLL_SECONDS)  # the page asks once more, and is told that nothing is left
        finally:
            server.shutdown()
            thread.join()
