"""Text environments for TRL's GRPOTrainer: prompts, a reward function for tasks of one turn, and an environment for
conversations.

    trainer = GRPOTrainer(model, reward_function(env), train_dataset=prompts(env), args=...)
    trainer = GRPOTrainer(model, environment_factory=environment_factory(env), train_dataset=prompts(env), args=...)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from textrl_gym.core import StopReason
from textrl_gym.data import chat
from textrl_gym.data.encoding import Chat
from textrl_gym.mdp.text_env import vector_env
from textrl_gym.rollouts.text_actions import TextActions, maker

if TYPE_CHECKING:
    from datasets import Dataset

OVER = "The conversation is over."
"""What is answered to a turn behind the end."""


def prompts(env: object, rows: int | None = None) -> Dataset:
    """The prompts of an environment's split as a data set of TRL, with columns `prompt` and `row`, its place.

    Of a conversation, and of a prompt with a chat template, `prompt` is a list of messages, else the text that the
    model continues.

    Args:
        env: a text environment, or an id.
        rows: the first so many; None: all.

    Raises:
        ValueError: no text environment, or fewer rows than are asked for.
    """
    from datasets import Dataset

    mdp = vector_env(env, num_envs=1) if isinstance(env, str) else vector_env(env)
    count = len(mdp.source) if rows is None else rows
    if not 0 < count <= len(mdp.source):
        raise ValueError(f"rows must be 1 to {len(mdp.source)}, got {rows}")

    def records() -> Any:
        for index in range(count):
            row = mdp.source[index]
            spoken = row.get("chat")
            # TRL gives tools to models in conversations alone.
            if not isinstance(spoken, Chat) and mdp.turns is not None:
                spoken = chat.user(row["prompt"])
            yield {"prompt": list(spoken) if isinstance(spoken, Chat) else row["prompt"], "row": index}

    return Dataset.from_list(list(records()))


def reward_function(env: object) -> Callable[..., list[float]]:
    """The score of an environment's completions as a reward function of TRL, for `prompts(env)`.

    It is the environment's own score of the generated ids, less its missing_eos_penalty.

    Args:
        env: a text environment with the model's tokenizer, or an id.

    Raises:
        ValueError: no text environment; or one of conversations, whose rewards belong to turns.
    """
    mdp = vector_env(env, num_envs=1) if isinstance(env, str) else vector_env(env)
    if mdp.turns is not None:
        raise ValueError(
            f"{type(mdp.task).__name__} is a conversation: give TRL environment_factory(env), and no reward function"
        )

    def reward(completion_ids: Sequence[Sequence[int]], row: Sequence[int], **columns: Any) -> list[float]:
        """The scores of completions."""
        rows = [mdp.source[index] for index in row]
        prompt_ids = [mdp.task.encode(one, mdp.tokenizer, mdp.max_prompt_tokens) for one in rows]
        ids = [_ended(mdp, list(of_row)) for of_row in completion_ids]
        scores = mdp.scorer.score(rows, prompt_ids, [of_row for of_row, _ in ids]).score_N.tolist()
        cut = [stop is StopReason.LENGTH for _, stop in ids]
        return [score - mdp.missing_eos_penalty * over for score, over in zip(scores, cut, strict=True)]

    reward.__name__ = type(mdp.task).__name__
    return reward


def _ended(mdp: Any, ids: list[int]) -> tuple[list[int], StopReason]:
    """A completion as the environment would have ended it, which TRL's sampler may not have done, and why."""
    for place, token in enumerate(ids[: mdp.max_new_tokens], start=1):
        if token in mdp.end_ids:
            return ids[:place], StopReason.EOS
        if mdp.scorer.completes_stop([ids[:place]])[0]:
            return ids[:place], StopReason.STOP_STRING
    return ids[: mdp.max_new_tokens], StopReason.LENGTH


def environment_factory(env: object, **settings: Any) -> Callable[[], TextEnvironment]:
    """What GRPOTrainer makes its environments with, one for each rollout; they share what is loaded.

    Args:
        env: an id, or a text environment that they are to be like.
        settings: of an id, those of the environment.
    """
    make = maker(env, **settings)
    return lambda: TextEnvironment(make())


class TextEnvironment:
    """An episode that a model speaks in by calling the tool `say`. TRL reads the tool's name and docstring.

    Args:
        env: steps whole turns.
    """

    def __init__(self, env: TextActions) -> None:
        self._env, self._return, self._over = env, 0.0, True

    def reset(self, row: int | None = None, **columns: Any) -> None:
        """Begin an episode with a row's prompt, which is in TRL's data set already."""
        self._env.reset(options=None if row is None else {"prompt_indices": [row]})
        self._return, self._over = 0.0, False

    def say(self, message: str) -> str:
        """Say something in the conversation, and read the answer.

        Args:
            message: All that is said in this turn.

        Returns:
            The answer.
        """
        if self._over:
            return OVER
        _, reward, terminated, truncated, info = self._env.step(message)
        self._return += float(reward)
        self._over = terminated or truncated
        return str(info.get("reply") or OVER)

    def get_reward(self) -> float:
        """The sum of the rewards of the turns; 0 where nothing was said by the tool."""
        return self._return
