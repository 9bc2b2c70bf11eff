"""vader: the sentiment of a completion, in [-1, 1]: VADER's compound score. Needs the package vaderSentiment.

Hutto and Gilbert 2014, VADER: a parsimonious rule-based model for sentiment analysis of social media text, ICWSM: a
lexicon of 7,500 words rated by people, and rules for negation, intensifiers, capitals and exclamation marks. It reads
no grammar and no subject, so that praise said again and again pleases it: watch `distinct_2` and the KL beside it.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

from textrl_gym.extras import install


def make(argument: str | None) -> Callable[..., list[float]]:
    """The reward; it takes no argument.

    Raises:
        ValueError: an argument.
        ImportError: vaderSentiment is not installed.
    """
    if argument:
        raise ValueError(f"reward 'vader' takes no argument, given {argument!r}")
    if importlib.util.find_spec("vaderSentiment") is None:
        raise ImportError(f"reward 'vader' needs the package vaderSentiment: {install('vader')}")
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()

    def reward(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
        """The compound score of each completion; 0 for a text without sentiment."""
        return [float(analyzer.polarity_scores(text)["compound"]) for text in completions]

    return reward
