"""Task: what one text task adds to the token MDP. A file in envs/ holds one subclass."""

from __future__ import annotations

from typing import Any, ClassVar

from textrl_gym.core import PromptSource, RewardSpec, Row
from textrl_gym.data import prompts
from textrl_gym.models import loading


class Task:
    """Prompts, budgets, and the default model and reward of one environment id.

    A file in envs/ holds one subclass and the line `ID = "Name-v0"`. A task of your own, anywhere, is registered with
    `textrl_gym.register("Mine-v0", "my_module:MyTask")` or given as `TextEnv(task=MyTask())`.
    """

    id: ClassVar[str] = ""
    max_prompt_tokens: int = 256
    max_new_tokens: int = 48
    model: str = ""
    """The language model that agents start from: a folder, a Hub id, or "smollm2-135m"."""
    reward: RewardSpec = "reward_model"
    gold: RewardSpec | None = None
    """The reward that `evaluate` reports beside the training reward; never trained on unless asked for."""
    kl_coef: float = 0.05
    """The per-token KL coefficient that agents start with on this task."""
    stop: tuple[str, ...] = ()
    keep_suffix: str = ""
    """The end of every prompt that cutting must not touch, such as "\\n\\nTL;DR:"."""

    def rows(self, split: str, dataset: str | None = None) -> PromptSource:
        """The prompts of a split: embedded where dataset is None, else a Hub id or a local file or folder."""
        raise ValueError(f"{type(self).__name__} defines no rows(split, dataset)")

    def load_tokenizer(self, name: str | None = None) -> Any:
        """The tokenizer `name` (Hub id, folder), or the task's own."""
        return loading.load_tokenizer(name or self.model)

    def load_model(self, name: str | None = None, **kwargs: Any) -> Any:
        """The causal LM `name` of transformers (Hub id, folder), or the task's own, in eval mode."""
        return loading.load_model(name or self.model, **kwargs)

    def encode(self, row: Row, tokenizer: Any, max_prompt_tokens: int) -> list[int]:
        """Token ids of a row's prompt, at most max_prompt_tokens; a longer prompt is cut at the end of its body.

        Raises:
            ValueError: the prompt is too long and its kept suffix leaves no room for any of the body.
        """
        return prompts.encode_prompt(row["prompt"], tokenizer, max_prompt_tokens, self.keep_suffix)
