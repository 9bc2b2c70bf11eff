"""Who answers a judge's questions, and a model behind an endpoint that does.

A question is asked at temperature 0. A reply that is no label is asked for again, a bounded number of times, and then
counts as no answer: it is never guessed. What was once answered is read from a file (sqlite) and never asked again,
also after a kill. The file's keys are hashes of the model's name, the template and the texts in their order, so that a
model of the same name at another address is taken for the same one. It holds no texts but the replies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import sqlite3
import threading
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol

from annotated_types import Ge

from textrl_gym.console import time_columns
from textrl_gym.core import Message
from textrl_gym.llm.endpoint import LONGEST_REPLY_BYTES, Client, ClientConfig, EndpointError, ask_together
from textrl_gym.llm.questions import (
    NONE,
    Form,
    Reply,
    fill_template,
    read_chances,
    read_label,
    read_template,
    without_markers,
)

ENDPOINT, LOCAL = "endpoint", "local"
"""The names of language models as judges: one behind an endpoint, and one of this machine (local:FOLDER)."""
CACHE = "judge-cache.sqlite"
REASON_TOKENS = 64
"""Fewer tokens leave no room for reasons and a last line."""


@dataclasses.dataclass(frozen=True)
class EndpointConfig(ClientConfig):
    """Which model judges, and how it is asked."""

    max_answer_tokens: Annotated[int, Ge(0)] = 16
    """Sent as max_tokens; 0: not sent, for models that refuse it or that think before they answer. With
    cot it must be 0 or at least 64."""
    template: Path | None = None
    """A file with the question, which holds {prompt}, {answer_a} and {answer_b}, and best {tag}, a number that no text
    holds, in what is around these; for scores {prompt} and {answer}. None: our own."""
    asks: Annotated[int, Ge(1)] = 3
    """Times that a question is asked before a reply that is none of A, B and tie counts as no verdict."""
    cache: Path | None = None
    """The file of verdicts, not asked for again; None: judge-cache.sqlite in the folder that is judged."""
    cot: bool = False
    """Ask for reasons first and for the verdict in a last line (chain of thought)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cot and 0 < self.max_answer_tokens < REASON_TOKENS:
            raise ValueError(
                f"cot needs room for reasons: max_answer_tokens must be 0 or at least {REASON_TOKENS}, got "
                f"{self.max_answer_tokens}"
            )


class Answered(NamedTuple):
    """What a model said to a question."""

    label: str
    """One of the form's, or "none"."""
    chances: dict[str, float] | None = None
    """P(label) of each, where log-probabilities are known."""


class Answerer(Protocol):
    """Who answers questions of one form."""

    name: str

    def answers(self, asked: Sequence[tuple[str, ...]]) -> list[Answered]:
        """The answers to questions, each the texts of the form's places. Equal questions are asked once.

        Raises:
            EndpointError: an endpoint fails for good.
        """
        ...


def shaped(form: Form, config: EndpointConfig) -> Form:
    """The form with the template and the chain of thought that the settings name.

    Raises:
        ValueError: the template cannot be read, or lacks a place.
    """
    form = dataclasses.replace(form, cot=config.cot)
    if config.template is None:
        return form
    # A user's template says itself how to reply.
    return dataclasses.replace(form, template=read_template(config.template, form.places), at_once="", with_reasons="")


# -- the file ---------------------------------------------------------------------------------------------------------


class Verdicts:
    """A file of verdicts, each whole or not there at all, for threads and processes side by side."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._open() as db:
            db.execute("CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, verdict TEXT, reply TEXT)")
        with self._open() as db:
            columns = {row[1] for row in db.execute("PRAGMA table_info(verdicts)")}
            if "chances" not in columns:  # a new file, or one of version 0.1
                with contextlib.suppress(sqlite3.OperationalError):  # another process was first
                    db.execute("ALTER TABLE verdicts ADD COLUMN chances TEXT")

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection for one transaction: nothing is shared between threads."""
        try:
            # `db` a second time is the transaction. 60 s: other processes' writes are waited for, not failed on.
            with contextlib.closing(sqlite3.connect(self.path, timeout=60)) as db, db:
                yield db
        except sqlite3.Error as error:
            raise ValueError(f"{str(self.path)!r} cannot hold verdicts: {error}") from error

    def known(self, keys: Iterable[str]) -> dict[str, Answered]:
        """The answers to those questions that there are."""
        query = "SELECT key, verdict, chances FROM verdicts WHERE key = ?"
        # A key at a time: SQLite bounds the number of parameters of one statement.
        with self._open() as db:
            rows = [db.execute(query, (key,)).fetchone() for key in keys]
        there = [row for row in rows if row is not None]
        return {key: Answered(label, None if chances is None else json.loads(chances)) for key, label, chances in there}

    def add(self, key: str, answered: Answered, reply: str) -> None:
        """Write down a verdict; when this returns, a kill does not undo it."""
        chances = None if answered.chances is None else json.dumps(answered.chances)
        with self._open() as db:
            db.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?, ?)", (key, answered.label, reply, chances))


# -- an endpoint ------------------------------------------------------------------------------------------------------


class EndpointModel:
    """A model behind an OpenAI-compatible endpoint; see Answerer and the head of this file.

    Args:
        config: which model, and how it is asked.
        form: of the questions.
        who: asks, for errors.

    Raises:
        ValueError: no model is named, or a bad template, key or cache.
        ImportError: without httpx2.
    """

    def __init__(self, config: EndpointConfig, form: Form, who: str, progress_bar: bool = True) -> None:
        self.config, self.progress_bar = config, progress_bar
        self.client = Client(config, who)
        self.name = f"{ENDPOINT} {config.model}"
        self.form = shaped(form, config)
        self.client.top_logprobs = form.top_logprobs
        if config.cot:
            self.client.most_bytes = LONGEST_REPLY_BYTES
        self.verdicts = Verdicts(config.cache or Path(CACHE))

    def answers(self, asked: Sequence[tuple[str, ...]]) -> list[Answered]:
        """See Answerer. Raises EndpointError; the verdicts that were given until then are kept."""
        keys = [self._key(texts) for texts in asked]
        self._ask_all(dict(zip(keys, asked, strict=True)))
        # Read back from the file, which holds the verdicts of earlier calls beside those just given.
        answered = self.verdicts.known(dict.fromkeys(keys))
        return [answered[key] for key in keys]

    def _key(self, texts: Sequence[str]) -> str:
        # JSON keeps the parts apart: ("ab", "c") and ("a", "bc") have different keys.
        more = ["cot"] if self.config.cot else []
        whole = json.dumps([self.config.model, self.form.question, *texts, *more])
        return hashlib.sha256(whole.encode()).hexdigest()

    def _ask_all(self, questions: Mapping[str, tuple[str, ...]]) -> None:
        """Ask what is not known yet, several at a time; each verdict is kept as soon as it is there."""
        known = self.verdicts.known(questions)
        open_ones = {key: asked for key, asked in questions.items() if key not in known}
        if not open_ones:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            *time_columns(elapsed=False),
        )
        with Progress(*columns, console=Console(stderr=True), disable=not self.progress_bar) as bar:
            task = bar.add_task(f"asking {self.config.model}", total=len(questions), completed=len(known))
            work = [functools.partial(self._ask, key, asked) for key, asked in open_ones.items()]
            try:
                ask_together(work, self.config.concurrency, lambda: bar.advance(task))
            except EndpointError as error:
                num_known = len(self.verdicts.known(questions))
                where = f"{num_known} of {len(questions)} verdicts are kept in {self.verdicts.path}"
                raise EndpointError(f"{error}; {where}, from where the same command goes on") from error

    def _ask(self, key: str, asked: tuple[str, ...], stop: threading.Event) -> None:
        """Ask one question until there is a verdict, and keep it."""
        texts = {place: without_markers(text) for place, text in zip(self.form.places, asked, strict=True)}
        question = fill_template(self.form.question, texts)
        answered, reply = Answered(NONE), Reply("")
        for number in range(self.config.asks):
            message: Message = {"role": "user", "content": question + (self.form.reminder if number else "")}
            # Temperature 0: a verdict is kept for good, so that it should be the one that would come again.
            reply = self.client.ask([message], 0.0, stop)
            label = read_label(self.form, reply.text)
            if label != NONE:
                answered = Answered(label, read_chances(self.form, reply))
                break
        self.verdicts.add(key, answered, reply.text)


# -- names ------------------------------------------------------------------------------------------------------------


def is_language_model(name: str | None) -> bool:
    """Whether a judge's name is that of a language model: endpoint, local or local:FOLDER."""
    return name is not None and name.partition(":")[0] in (ENDPOINT, LOCAL)


def parse_name(name: str, config: EndpointConfig) -> tuple[str, str | None, EndpointConfig]:
    """A judge's name as its kind, the model of a local one (None: the task's), and the settings.

    Args:
        name: endpoint, endpoint:MODEL, endpoint:MODEL@URL, local, or local:MODEL.
        config: the settings that the name does not say.

    Raises:
        ValueError: it is none of these, or settings of an endpoint are given to a local model.
    """
    kind, _, rest = name.partition(":")
    if kind == ENDPOINT:
        model, at, url = rest.rpartition("@") if "@http" in rest else (rest, "", "")
        named = dataclasses.replace(config, model=model or config.model, url=url if at else config.url)
        return kind, None, named
    if kind != LOCAL:
        raise ValueError(f"a language model as judge is endpoint, local or local:FOLDER, got {name!r}")
    allowed = {"template", "cot", "max_answer_tokens"}
    for field in dataclasses.fields(config):
        if field.name not in allowed and getattr(config, field.name) != field.default:
            raise ValueError(
                f"{field.name} is a setting of an endpoint, and the judge is {name!r}, which takes "
                f"{', '.join(sorted(allowed))}"
            )
    return kind, rest or None, config


def read_settings(file: Path) -> tuple[str, EndpointConfig]:
    """A judge's name and settings from a TOML file: `judge`, and the fields of EndpointConfig.

    Raises:
        ValueError: no such file, no TOML, or a key or value that there is not.
    """
    try:
        table: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"cannot read the judge's settings {str(file)!r}: {error}") from error
    name = table.pop("judge", ENDPOINT)
    kinds = {field.name: type(field.default) for field in dataclasses.fields(EndpointConfig)}
    for key, value in table.items():
        if key not in kinds:
            raise ValueError(f"{str(file)!r}: unknown key {key!r}; allowed: judge, {', '.join(kinds)}")
        kind = str if kinds[key] is type(None) else kinds[key]  # paths
        if not (type(value) is kind or (kind is float and type(value) is int)):
            raise ValueError(f"{str(file)!r}: {key} must be of type {kind.__name__}, got {value!r}")
    settings: dict[str, Any] = table | {key: Path(table[key]) for key in ("template", "cache") if key in table}
    return str(name), EndpointConfig(**settings)
