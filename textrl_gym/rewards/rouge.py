"""rouge: the F measure of ROUGE against the reference text, in [0, 1]. "rouge" is ROUGE-L; else "rouge:rouge1".

Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries, https://aclanthology.org/W04-1013, as Google's
rouge-score computes it, with Porter's stemmer.
"""

import importlib.util
import re
from collections.abc import Callable
from typing import Any

from textrl_gym.rewards import missing_reference


def make(argument: str | None) -> Callable[..., list[float]]:
    """The reward of one kind of ROUGE: rouge1 to rouge9 (n-grams), rougeL (default), rougeLsum (line by line).

    Raises:
        ValueError: an unknown kind.
        ImportError: rouge-score is not installed.
    """
    kind = argument or "rougeL"
    if re.fullmatch(r"rouge([1-9]|L|Lsum)", kind) is None:
        raise ValueError(f"unknown kind of rouge {kind!r}; allowed: rouge1 to rouge9, rougeL, rougeLsum")
    if importlib.util.find_spec("rouge_score") is None:
        raise ImportError("reward 'rouge' needs the package rouge-score: pip install rouge-score")
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([kind], use_stemmer=True)

    def reward(
        prompts: list[str], completions: list[str], completion: list[str] | None = None, **columns: list[Any]
    ) -> list[float]:
        """The F measure of each row; the reference is the rows' column `completion`."""
        if completion is None:
            raise missing_reference("rouge", columns)
        pairs = zip(completion, completions, strict=True)
        return [scorer.score(target, prediction)[kind].fmeasure for target, prediction in pairs]

    return reward
