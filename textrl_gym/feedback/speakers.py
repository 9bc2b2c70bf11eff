"""Chat models that reply to single questions: one that is loaded here, or one behind an endpoint.

Both reply as they did before to what they were asked before: the loaded one decodes greedily, and of the other one each
reply is in a file (sqlite) before it is used, so that a critic that was stopped asks nothing twice.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from textrl_gym.data import chat
from textrl_gym.llm.asking import ENDPOINT, Answered, Verdicts
from textrl_gym.llm.endpoint import Client, ClientConfig, EndpointError, ask_together
from textrl_gym.llm.questions import fill_template, without_markers

if TYPE_CHECKING:
    from textrl_gym.core import Row

REPLIES = "replies.sqlite"
"""The file of an endpoint's replies, in the folder of the work."""
NEW_TOKENS = 192
"""Of a loaded model's reply: a critique of two sentences, or an answer."""
LONGEST_QUESTION = 2048
"""Tokens of a question to a loaded model that takes more: attention costs their square."""
AT_ONCE = 8
"""Questions that a loaded model is asked together."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A question and the texts that stand in it."""

    template: str
    """With {places} for the values, and {tag} in what is around the texts of others."""
    values: Mapping[str, str]

    @property
    def key(self) -> str:
        """The same for the same question, whatever the tags' number."""
        return hashlib.sha256(json.dumps([self.template, sorted(self.values.items())]).encode()).hexdigest()

    def text(self) -> str:
        """The question as it is asked: in the same words each time, also after a stop."""
        return fill_template(self.template, self.values)


class Speaker(Protocol):
    """A chat model."""

    name: str
    settings: Mapping[str, Any]
    """What its replies follow from, as JSON can hold it."""

    def say(self, questions: Sequence[Question]) -> list[str]:
        """The reply to each."""
        ...


class EndpointSpeaker:
    """A model behind an OpenAI-compatible endpoint, asked at temperature 0.

    Args:
        config: which model, and how it is asked.
        cache: the file of its replies.

    Raises:
        ValueError: no model is named, or a bad key; ImportError without httpx2.
    """

    def __init__(self, config: ClientConfig, cache: Path) -> None:
        self.client = Client(config, f"critic {ENDPOINT!r}")
        self.name = f"{ENDPOINT} {config.model}"
        # Where it is, and how patiently it is asked, may change on the way.
        self.settings: Mapping[str, Any] = {
            "by": ENDPOINT,
            "model": config.model,
            "max_answer_tokens": config.max_answer_tokens,
        }
        self._prefix = json.dumps(self.settings)
        self.cache = cache

    def say(self, questions: Sequence[Question]) -> list[str]:
        """See Speaker.

        Raises:
            EndpointError: the endpoint fails for good. The replies until then are kept.
        """
        replies = Verdicts(self.cache)  # a reply is kept whole in the place of a verdict
        by_key = {self._key(question): question for question in questions}
        missing = {key: by_key[key] for key in by_key.keys() - replies.known(by_key).keys()}

        def ask(key: str, question: Question, stop: threading.Event) -> None:
            # A server encodes a message with its special tokens: their names in a text would end the question.
            texts = {name: without_markers(text) for name, text in question.values.items()}
            message = {"role": "user", "content": Question(question.template, texts).text()}
            replies.add(key, Answered(self.client.ask([message], 0.0, stop).text), "")

        work = [functools.partial(ask, key, missing[key]) for key in by_key if key in missing]
        try:
            ask_together(work, self.client.config.concurrency, lambda: None)
        except EndpointError as error:
            raise EndpointError(f"{error}; replies are kept in {self.cache}, the same command goes on") from error
        known = replies.known(by_key)
        return [known[self._key(question)].label for question in questions]

    def _key(self, question: Question) -> str:
        return hashlib.sha256((self._prefix + question.key).encode()).hexdigest()


class ModelSpeaker:
    """A chat model of transformers, asked by its chat template, decoded greedily.

    Args:
        model: a Hub id or a folder.
        device: auto, cpu or cuda.

    Raises:
        ValueError: it cannot be loaded, has no chat template, or takes too few tokens.
    """

    def __init__(self, model: str, device: str = "auto") -> None:
        from textrl_gym.mdp.task import Task
        from textrl_gym.models import loading, positions
        from textrl_gym.pipeline.sample_preferences import load_policy

        self.name = f"model {model}"
        self.settings: Mapping[str, Any] = {"by": "model", "model": model}
        self.task = Task()
        self.task.max_new_tokens = NEW_TOKENS
        self.task.max_prompt_tokens = 1  # only tried out with it; what it may be follows from the model
        if not self.task.load_tokenizer(model).chat_template:
            raise ValueError(f"critic {model!r} has no chat template: name a chat model, or ask an endpoint")
        self.policy, self.tokenizer = load_policy(model, self.task, loading.resolve_device(device))
        self.policy.require_one_text("be a judge or a critic")
        # Rotary positions have no end, but what a model was made for is where its replies make sense.
        room = positions.limit(self.policy.model) or positions.stated(self.policy.model.config)
        self.task.max_prompt_tokens = LONGEST_QUESTION if room is None else min(LONGEST_QUESTION, room - NEW_TOKENS)
        if self.task.max_prompt_tokens < 1:
            raise ValueError(f"critic {model!r} takes {room} tokens; a reply may have {NEW_TOKENS}")

    def say(self, questions: Sequence[Question]) -> list[str]:
        """See Speaker.

        Raises:
            ValueError: a question is longer than the model takes: cut, it would lose a tag.
        """
        from textrl_gym.pipeline.simulated_comparisons import decode, sample_texts

        replies = []
        for first in range(0, len(questions), AT_ONCE):
            rows = [self._row(question) for question in questions[first : first + AT_ONCE]]
            sampled = sample_texts(self.policy, self.task, self.tokenizer, rows, 1, 0.0, 0)
            replies += [decode(self.tokenizer, ids) for (ids,) in sampled]
        return replies

    def _row(self, question: Question) -> Row:
        row = {"prompt": question.text(), "chat": chat.user(question.text())}
        length, most = len(self.task.encode(row, self.tokenizer, sys.maxsize)), self.task.max_prompt_tokens
        if length > most:
            raise ValueError(f"a question to {self.name} has {length} tokens, and it takes {most}: shorten the answers")
        return row
