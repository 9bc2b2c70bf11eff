"""CopyText-v0: write the prompt again, then stop. Solvable exactly, learnt from nothing in seconds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from textrl_gym.core import Row
from textrl_gym.data import sources
from textrl_gym.mdp.task import Task

if TYPE_CHECKING:  # a list of environments is read without torch
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

ID = "CopyText-v0"

SYMBOLS = ("a", "b", "c", "d")
LENGTH = 2  # 16 prompts: PPO and GRPO copy all of them greedily after 12,000 tokens
EOS_ID = 0


def copied(
    prompts: list[str], completions: list[str], *, completion_ids: list[list[int]], **columns: list[Any]
) -> list[float]:
    """Half for ending after exactly as many symbols as the prompt has, half for the share of symbols that are right.

    The end counts that much because it must be learnt before the policy has forgotten EOS: with a mere share of right
    places, EOS is unlearnt as a bad first token long before it could be useful as the last one.
    """
    scores = []
    for prompt, completion, ids in zip(prompts, completions, completion_ids, strict=True):
        expected, written = prompt.split(), completion.split()
        right = sum(a == b for a, b in zip(expected, written, strict=False)) / len(expected)
        # By id and not by the text, which does not show whether EOS or the budget ended it.
        ended = len(written) == len(expected) and ids[-1:] == [EOS_ID]
        scores.append(0.5 * ended + 0.5 * right)
    return scores


class CopyText(Task):
    """Copy the prompt, token by token, then end.

    ## Description
    The prompt is two of four symbols. The policy is asked to write the same two and then EOS. The task's own language
    model is a random one, so everything is learnt from the reward: a test of an algorithm's mechanics.

    ## Observation Space
    `Dict(input_ids: Box int64 [5], attention_mask: Box int8 [5])`: two prompt places, three generated.

    ## Action Space
    `Discrete(5)`: EOS, a, b, c, d.

    ## Reward
    At the end, half for ending at the right place and half for the share of right symbols, in [0, 1]; minus the KL
    penalty where it is on.

    ## Episode End
    Terminated by EOS, truncated after three tokens.

    ## Information
    At the end `score`, `prompt`, `completion`, `reference`, `stop_reason`.

    ## Arguments
    Those of every text environment: see textrl_gym.mdp.text_env.TextVectorEnv.

    ## References
    In the spirit of the identity environments of Stable-Baselines3's tests.

    ## Version History
    * v0: first version
    """

    max_prompt_tokens = LENGTH
    max_new_tokens = LENGTH + 1
    model = "a random GPT-2 made in code"
    reward = "textrl_gym.envs.copy_text:copied"
    kl_coef = 0.02

    def rows(self, split: str, dataset: str | None = None) -> Sequence[Row]:
        """All 16 prompts, in every split: the task is to solve them, not to generalise."""
        sources.check_split(split)
        if dataset is not None:
            raise ValueError(f"CopyText-v0 has only its own prompts; dataset must be None, got {dataset!r}")
        texts = [" ".join(symbols) for symbols in itertools.product(SYMBOLS, repeat=LENGTH)]
        return [{"prompt": text, "completion": text} for text in texts]

    def load_tokenizer(self, name: str | None = None) -> PreTrainedTokenizerBase:
        from textrl_gym.models import tiny

        return tiny.symbol_tokenizer(SYMBOLS) if name is None else super().load_tokenizer(name)

    def load_model(
        self, name: str | None = None, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> nn.Module:
        if name is not None:
            return super().load_model(name, device=device, dtype=dtype)
        from textrl_gym.models import tiny

        # Learned positions: with rotary ones it copied the symbols but never learnt "the third token" (0.64 of 1).
        return tiny.gpt2(len(SYMBOLS) + 1, 2 * LENGTH + 1)
