"""A scripted endpoint that judges, with log-probabilities, and what tests of judges share."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from test_endpoint import Handler, Server, server

from textrl_gym.judges.judge import Answer, Comparisons, compare
from textrl_gym.judges.llm_judge import Endpoint, LanguageJudge
from textrl_gym.llm.asking import EndpointConfig

__all__ = ["server"]  # a fixture

ENV = "TLDRSummarize-v0"
"""Its tokenizer has all letters, and its model room for a question."""


def near(value: object, abs: float = 1e-9) -> Any:
    return pytest.approx(value, abs=abs, rel=0)


# -- an endpoint with log-probabilities -------------------------------------------------------------------------------


def spoken(handler: Handler, *tokens: Mapping[str, float] | str) -> None:
    """Reply with tokens, each the most likely of {text: probability}; a text alone is certain."""
    content = []
    for token in tokens:
        chances = {token: 1.0} if isinstance(token, str) else dict(token)
        listed = [{"token": text, "logprob": math.log(chance)} for text, chance in chances.items()]
        likeliest = list(chances.values()).index(max(chances.values()))
        content.append(listed[likeliest] | {"top_logprobs": listed})
    text = "".join(str(one["token"]) for one in content)
    choice = {"message": {"role": "assistant", "content": text}, "logprobs": {"content": content}}
    handler.send(200, json.dumps({"choices": [choice]}))


def shown_texts(handler: Handler) -> tuple[str, str]:
    """The two answers of a question, read as the model is told to: between the tags with the number."""
    question = handler.body["messages"][0]["content"]
    tag = re.search(r"with the number (\w{16});", question)
    assert tag is not None
    a, b = (re.search(rf"<answer_{x} {tag[1]}>\n(.*)\n</answer_{x} {tag[1]}>", question, re.DOTALL) for x in "ab")
    assert a is not None and b is not None
    return a[1], b[1]


@pytest.fixture
def config(server: Server, tmp_path: Path) -> EndpointConfig:
    return EndpointConfig("tester", server.url, backoff_seconds=0.001, retries=3, cache=tmp_path / "v.sqlite")


def judge_of(config: EndpointConfig, **changes: Any) -> Endpoint:
    return Endpoint(dataclasses.replace(config, **changes), progress_bar=False)


def ask(judge: LanguageJudge, *pairs: tuple[str, str]) -> Comparisons:
    rows = [{"prompt": f"p{number}"} for number in range(len(pairs))]
    return compare(judge, rows, [Answer(a) for a, _ in pairs], [Answer(b) for _, b in pairs])


def by_length(handler: Handler, shorter: float = 0.2) -> None:
    """P(first) is 0.9 where the longer text stands first; shorter: where it stands second."""
    a, b = shown_texts(handler)
    first = 0.9 if len(a) > len(b) else shorter
    spoken(handler, {"A": first, "B": 0.98 - first, "Both": 0.02})
