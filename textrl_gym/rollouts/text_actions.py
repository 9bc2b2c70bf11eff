"""Macro-actions: a text environment for agents that speak whole turns, such as models behind an API and people.

The MDP stays that of tokens: a text becomes tokens, which are stepped one by one, and an end token behind them.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, SupportsFloat

import gymnasium as gym
from gymnasium import spaces

from textrl_gym.bounds import check, shown
from textrl_gym.core import Message, Row
from textrl_gym.data.chat import as_text
from textrl_gym.data.encoding import Chat, Unknown, codec
from textrl_gym.data.rows import check_characters
from textrl_gym.mdp.text_env import TextEnv, TextVectorEnv, vector_env

if TYPE_CHECKING:
    from textrl_gym.data.encoding import TextCodec

LONGEST = 100_000_000
"""Characters of an observation; more than any prompt has."""
TAIL_TOKENS = 8
"""Decoded to see how the text ends that the agent's stands behind: a character may have several tokens."""


class AnyText(spaces.Text):
    """A space of texts of any characters.

    Args:
        max_length: characters.
        text_codec: of a tokenizer, of whose tokens samples are made, since a small vocabulary knows few texts.
        max_tokens: of a sample.
    """

    def __init__(self, max_length: int, text_codec: TextCodec | None = None, max_tokens: int = 0) -> None:
        super().__init__(max_length, min_length=0, charset=string.printable)
        self.codec, self.max_tokens = text_codec, max_tokens
        unknown = frozenset() if text_codec is None else text_codec.special | text_codec.forbidden
        vocab = {} if text_codec is None else text_codec.tokenizer.get_vocab()
        self._ids = sorted(set(vocab.values()) - unknown)

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """A text of random tokens, or of random characters where there is no tokenizer."""
        if self.codec is None or mask is not None or probability is not None:
            return super().sample(mask, probability)
        size = int(self.np_random.integers(1, self.max_tokens + 1))
        return self.codec.decode([self._ids[i] for i in self.np_random.integers(len(self._ids), size=size)])

    def contains(self, x: Any) -> bool:
        """Whether x is a text that is not too long."""
        return isinstance(x, str) and len(x) <= self.max_length

    @property
    def is_np_flattenable(self) -> bool:
        """No: an array would need a number for each character that there is."""
        return False


class TextActions(gym.Wrapper[Any, str, Any, Any], gym.utils.RecordConstructorArgs):
    """A text environment whose action is a whole turn, as text. One step is one turn: an episode, in most tasks.

    ## Observation Space
    `messages`: a tuple of {"role", "content"}, the prompt's first; a prompt that is no conversation is what a user
    says. `text`: the same as one text. The prompt is whole here; agents that write tokens see max_prompt_tokens of it.

    ## Action Space
    `gymnasium.spaces.Text`. Names of special tokens in it are letters. Its tokens and an end token are stepped one by
    one; what is beyond the budget of the turn, or behind a stop string, is left out (`cut_tokens`).

    ## Reward
    The sum of the rewards of the turn's tokens.

    ## Information
    That of the turn's last token; `turn_ids`, the tokens that were stepped; and `cut_tokens`, those of the text that
    were not.

    Args:
        env: a TextEnv, wrapped or not, or an id.
        observation: "messages" or "text".
        separator: stands before a text that would otherwise touch the last word of what it stands behind.
        unknown: what becomes of words that have no token: "raise" an error, or "skip" them.

    Raises:
        ValueError: a vector environment; a KL penalty, for which texts have no log-probabilities; or a conversation in
            which no token ends a turn without ending the conversation.
    """

    def __init__(
        self,
        env: str | gym.Env[Any, Any],
        observation: Literal["messages", "text"] = "messages",
        separator: str = " ",
        unknown: Unknown = "raise",
    ) -> None:
        check("observation", observation, Literal["messages", "text"])
        check("unknown", unknown, Unknown)
        check("separator", separator, str)
        env = gym.make(env) if isinstance(env, str) else env
        if not isinstance(getattr(env, "unwrapped", None), TextEnv):
            raise ValueError(f"TextActions needs a single text environment (TextEnv), got {shown(env)}")
        # So that the spec of the wrapped environment can make it again.
        gym.utils.RecordConstructorArgs.__init__(self, observation=observation, separator=separator, unknown=unknown)
        gym.Wrapper.__init__(self, env)
        self.observation, self.separator, self.unknown = observation, separator, unknown
        self.mdp: TextVectorEnv = vector_env(env)
        if self.mdp.kl_coef:
            raise ValueError(
                f"kl_coef={self.mdp.kl_coef}: an agent that gives texts has no log-probabilities; make the "
                "environment without the penalty"
            )
        self.codec = codec(self.mdp.tokenizer)
        self.end_id = _end_of_turn(self.mdp)
        """The token behind each text."""
        self._row: Row | None = None
        self._messages: list[Message] = []
        self._turns: list[Message] = []
        self.context: list[int] = []
        """The tokens so far, the prompt's first."""
        budget = min(self.mdp.max_turn_tokens or self.mdp.max_new_tokens, self.mdp.max_new_tokens)
        longest = max(map(len, self.mdp.tokenizer.get_vocab()))
        self.action_space = AnyText(budget * longest + len(separator), self.codec, budget)
        self.observation_space = AnyText(LONGEST)
        if observation == "messages":
            one = spaces.Dict({"role": AnyText(LONGEST), "content": AnyText(LONGEST)})
            self.observation_space = spaces.Sequence(one)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode. options={"prompt_indices": [i]} fixes the prompt."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._row = row = self.mdp.source[int(info["prompt_index"])]
        chat = row.get("chat")
        spoken = chat if isinstance(chat, Chat) else [{"role": "user", "content": row["prompt"]}]
        self._messages, self._turns = [dict(turn) for turn in spoken], []
        self.context = _ids_of(observation)
        return self._observation(), info

    def step(self, action: str) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Say a turn.

        Raises:
            ValueError: the action is no text, or one that cannot be encoded.
        """
        if self._row is None:
            raise gym.error.ResetNeeded("call reset() before step()")
        if not isinstance(action, str):
            raise ValueError(f"an action of TextActions is a text, got {shown(action)}")
        ids, reward = self.encode(action), 0.0
        taken = 0
        for token in ids:
            action_of_token: Any = token  # an int: this wrapper's own actions are texts
            observation, of_token, terminated, truncated, info = self.env.step(action_of_token)
            reward, taken = reward + float(of_token), taken + 1
            # Every turn's last step tells what was replied, an empty text too.
            if terminated or truncated or "reply" in info:
                break
        # An end token that the budget has no place for is none of the text's.
        info |= {"turn_ids": ids[:taken], "cut_tokens": max(0, len(ids) - 1 - taken)}
        self._turns.append({"role": "assistant", "content": self.mdp.scorer.text(ids[:taken])})
        if info.get("reply") is not None:
            self._turns.append({"role": "user", "content": info["reply"]})
        self.context = _ids_of(observation)
        return self._observation(), reward, terminated, truncated, info

    def encode(self, text: str) -> list[int]:
        """The tokens that a text would be stepped as now, the end token last.

        Raises:
            ValueError: half of a character, or naming a word for which the tokenizer has no token.
        """
        assert self._row is not None
        check_characters(text, "a text")
        if text and not text[0].isspace() and self._touches():
            text = self.separator + text
        # A chat template or a reply ends as texts do that others stand behind; a prompt may end in any word.
        if self._turns or isinstance(self._row.get("chat"), Chat):
            return [*(self.codec.behind(text, unknown=self.unknown) if text else ()), self.end_id]
        (ids,) = self.codec.completions(self._row["prompt"], [text], unknown=self.unknown)
        return [*ids, self.end_id]

    def _touches(self) -> bool:
        """Whether the next word would stand at a word without a space between them."""
        if self.context[-1] in self.codec.special:
            return False
        tail = self.codec.decode(self.context[-TAIL_TOKENS:])
        return bool(tail) and not tail[-1].isspace()

    def _observation(self) -> tuple[Message, ...] | str:
        if self.observation == "messages":
            return tuple(dict(turn) for turn in (*self._messages, *self._turns))
        assert self._row is not None
        return self._row["prompt"] + (as_text(self._turns) if self._turns else "")


def maker(env: object, **settings: Any) -> Callable[[], TextActions]:
    """A function that makes environments of one kind, which share what is loaded: for libraries that want one for each
    conversation.

    Args:
        env: an id, or a text environment that they are to be like.
        settings: of an id, those of the environment.

    Raises:
        ValueError: no text environment, settings beside one that is made already, or see TextActions.
    """
    if settings and not isinstance(env, str):
        raise ValueError(f"{', '.join(settings)}: settings are for an environment that is named by its id")
    given = vector_env(env, **({"num_envs": 1} | settings)) if isinstance(env, str) else vector_env(env)
    keywords = given.keywords(group_size=1, array="numpy", render_mode=None)
    del keywords["autoreset_mode"]  # of vector environments
    TextActions(TextEnv(**keywords))  # what it refuses is refused now

    def make() -> TextActions:
        return TextActions(TextEnv(**keywords))

    return make


def _ids_of(observation: dict[str, Any]) -> list[int]:
    """The tokens so far, without padding."""
    ids = observation["input_ids"][observation["attention_mask"] == 1].tolist()
    assert isinstance(ids, list)
    return ids


def _end_of_turn(mdp: TextVectorEnv) -> int:
    """The usual token that ends a turn and not the whole conversation."""
    if mdp.turns is None:
        return mdp.end_ids[0]
    for token in mdp.turns.end_ids:
        if token not in mdp.turns.closing_ids:
            return token
    names = ", ".join(mdp.task.ends_conversation)
    raise ValueError(
        f"{type(mdp.task).__name__}: each end token ({names}) ends the whole conversation, and none a turn"
    )
