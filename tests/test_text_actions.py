"""TextActions: a turn as text is worth what its tokens are, and no text becomes a special token."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import transformers
from gymnasium.utils.env_checker import check_env as gymnasium_check
from tokenizers import Tokenizer, models, pre_tokenizers

import textrl_gym
from textrl_gym import registry
from textrl_gym.core import Message, Reply, Row, StopReason
from textrl_gym.data.encoding import codec
from textrl_gym.mdp.task import Task
from textrl_gym.mdp.text_env import TextEnv
from textrl_gym.models import tiny
from textrl_gym.rollouts.text_actions import TextActions

SYMBOLS = ("a", "b", "c", "d", "e")
IDS = sorted(registry.env_ids())


class Guess(Task):
    """The reply is one symbol more than was said; "e" ends the conversation. Two turns at least are worth something."""

    max_prompt_tokens, max_new_tokens, max_turns, max_turn_tokens = 3, 20, 4, 4
    turn_markers = ("", "")
    model = "made in code"

    def __init__(self) -> None:
        self.reward = lambda prompts, completions, *, turns, **columns: [float(len(said)) for said in turns]

    def rows(self, split: str, dataset: str | None = None) -> Sequence[Row]:
        return [{"prompt": "a b"}, {"prompt": "c"}]

    def reply(self, row: Row, turns: Sequence[Message]) -> Reply:
        words = turns[-1]["content"].split()
        return Reply(" ".join(["d", *words][:3]), 0.25 * len(words), done="e" in words)

    def load_tokenizer(self, name: str | None = None) -> Any:
        return tiny.symbol_tokenizer(SYMBOLS)


def stepped(env: gym.Env[Any, Any], ids: Sequence[int]) -> tuple[float, dict[str, Any]]:
    """The sum of the rewards of tokens stepped one by one until an episode or the tokens end."""
    total, info = 0.0, dict[str, Any]()
    for token in ids:
        _, reward, terminated, truncated, info = env.step(token)
        total += float(reward)
        if terminated or truncated:
            break
    return total, info


@pytest.mark.parametrize("env_id", ["CopyText-v0", "KnownOptimum-v0", "TLDRSummarize-v0"])
def test_a_text_is_worth_what_its_tokens_are(env_id: str) -> None:
    text = "a b" if env_id != "TLDRSummarize-v0" else "I lost my job, and my sister does not help. <|endoftext|>"
    env = textrl_gym.TextActions(env_id)
    plain = gym.make(env_id)
    for place in (0, 1):
        messages, info = env.reset(seed=3, options={"prompt_indices": [place]})
        plain.reset(seed=3, options={"prompt_indices": [place]})
        row = env.mdp.source[place]
        assert messages == ({"role": "user", "content": row["prompt"]},)
        # By hand: behind its prompt, with a space between, and the end token.
        (words,) = codec(env.mdp.tokenizer).completions(row["prompt"], [" " + text])
        messages, reward, terminated, truncated, info = env.step(text)
        expected, last = stepped(plain, [*words, env.mdp.eos_id])
        assert reward == expected == pytest.approx(info["score"])
        assert terminated and not truncated
        assert info["turn_ids"] == [*words, env.mdp.eos_id] and info["cut_tokens"] == 0
        assert info["completion"] == last["completion"] and info["completion"].strip() == text
        assert messages[1:] == ({"role": "assistant", "content": info["completion"]},)


def test_turns_are_worth_what_their_tokens_are() -> None:
    env, plain = TextActions(TextEnv(task=Guess(), split="train")), TextEnv(task=Guess(), split="train")
    env.reset(options={"prompt_indices": [0]})
    plain.reset(options={"prompt_indices": [0]})
    said = []
    for text in ("a", "b c", "e"):
        messages, reward, terminated, _, info = env.step(text)
        expected, last = stepped(plain, info["turn_ids"])
        assert reward == expected
        assert {k: v for k, v in info.items() if k not in ("turn_ids", "cut_tokens")} == last
        said += [{"role": "assistant", "content": text}, {"role": "user", "content": info["reply"]}]
        assert [m | {"content": m["content"].strip()} for m in messages[1:]] == said
    # 0.25 for each of 1, 2 and 1 words; a score of 6, the messages said; "e" ends it.
    assert terminated and reward == 0.25 + 6 and info["stop_reason"] == StopReason.DONE
    assert [len(turn["content"].split()) for turn in said] == [1, 2, 2, 3, 1, 2]


def test_what_is_beyond_the_budget_is_cut_and_counted() -> None:
    env = TextActions(gym.make("CopyText-v0"))  # three tokens
    env.reset(options={"prompt_indices": [0]})
    _, _, terminated, truncated, info = env.step("a b c d a")
    assert truncated and not terminated and info["stop_reason"] == StopReason.LENGTH
    assert info["completion"].split() == ["a", "b", "c"] and info["cut_tokens"] == 2
    env.reset(options={"prompt_indices": [0]})
    *_, info = env.step("a b c")  # the end token has no place, but no word is lost
    assert info["stop_reason"] == StopReason.LENGTH and info["cut_tokens"] == 0
    turns = TextActions(TextEnv(task=Guess(), split="train"))
    turns.reset(options={"prompt_indices": [0]})
    messages, _, terminated, truncated, info = turns.step("a a a a b b")  # four tokens a turn
    assert not terminated and not truncated and info["cut_tokens"] == 2
    assert messages[1]["content"].split() == ["a"] * 4
    stopping = TextActions(gym.make("CopyText-v0", stop=["c"], max_new_tokens=8))
    stopping.reset(options={"prompt_indices": [0]})
    *_, info = stopping.step("a c d d")
    assert info["stop_reason"] == StopReason.STOP_STRING and info["cut_tokens"] == 2
    assert info["completion"].split() == ["a"]


def test_an_empty_text_ends_at_once() -> None:
    env = TextActions(gym.make("CopyText-v0"))
    env.reset()
    *_, info = env.step("")
    assert info["turn_ids"] == [0] and info["completion"] == ""


def test_names_of_special_tokens_are_letters() -> None:
    env = TextActions(gym.make("TLDRSummarize-v0"))
    env.reset(seed=0)
    name = env.mdp.tokenizer.convert_ids_to_tokens(env.mdp.eos_id)
    *_, info = env.step(f"one {name} two {name}")
    assert info["turn_ids"].count(env.mdp.eos_id) == 1 and info["turn_ids"][-1] == env.mdp.eos_id
    assert info["completion"] == f" one {name} two {name}"


CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}<e>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)


SPOKEN = ("<s>", "user", "a", "b", "<e>", "<s>", "assistant", "c")


class Talk(Guess):
    """Prompts are conversations, which a chat template writes."""

    def rows(self, split: str, dataset: str | None = None) -> Sequence[Row]:
        return [{"prompt": "a b"}]

    def load_tokenizer(self, name: str | None = None) -> Any:
        words = ["<eos>", "<s>", "<e>", "user", "assistant", "\n", *SYMBOLS]
        inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        loaded = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")
        loaded.add_special_tokens({"additional_special_tokens": ["<s>", "<e>"]})
        loaded.chat_template = CHAT
        return loaded


def test_a_conversation_shows_all_that_was_said_by_its_template() -> None:
    env = TextActions(TextEnv(task=Talk(), split="train", template="chat", max_prompt_tokens=12, max_new_tokens=40))
    messages, _ = env.reset()
    assert messages == ({"role": "user", "content": "a b"},)
    messages, *_ = env.step("c")
    assert [m["role"] for m in messages] == ["user", "assistant", "user"]
    # The turn ended by EOS, which the template writes no end for: <e> follows, and the user's turn.
    names = env.mdp.tokenizer.convert_ids_to_tokens(env.context)  # what a model would see
    assert names == [*SPOKEN, "<eos>", "<e>", "<s>", "user", "d", "c", "<e>", "<s>", "assistant"]
    with pytest.raises(ValueError, match="no token for '<e>'"):  # as letters, which this vocabulary lacks
        env.step("c <e>")
    text, _ = TextActions(env.env, "text").reset()
    assert isinstance(text, str) and "a b" in text


def test_a_turn_must_have_an_end_of_its_own() -> None:
    class Closing(Guess):
        ends_conversation = ("<eos>",)

    name = str(Closing().load_tokenizer().convert_ids_to_tokens(0))
    Closing.ends_conversation = (name,)
    with pytest.raises(ValueError, match="ends the whole conversation, and none a turn"):
        TextActions(TextEnv(task=Closing(), split="train"))


@pytest.mark.parametrize(("env_id", "observation"), [*((i, "messages") for i in IDS), ("CopyText-v0", "text")])
def test_gymnasium_checker(env_id: str, observation: Any) -> None:
    env = TextActions(gym.make(env_id, disable_env_checker=True).unwrapped, observation)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*different from the unwrapped version.*")
        warnings.filterwarnings("ignore", message=".*observation space.*")
        gymnasium_check(env, skip_render_check=True)
    seen, _ = env.reset(seed=0)
    assert seen in env.observation_space


def test_samples_are_texts_of_the_vocabulary_and_seeded() -> None:
    env = TextActions(gym.make("CopyText-v0"))
    env.action_space.seed(4)
    samples = [env.action_space.sample() for _ in range(20)]
    env.action_space.seed(4)
    assert samples == [env.action_space.sample() for _ in range(20)] and len(set(samples)) > 10
    assert all(text in env.action_space and set(text.split()) <= {"a", "b", "c", "d"} for text in samples)
    assert "x" * 100_000 not in env.action_space and np.int64(3) not in env.action_space


def test_bad_input_names_itself() -> None:
    with pytest.raises(ValueError, match="TextActions needs a single text environment"):
        TextActions(gym.make("CartPole-v1"))
    with pytest.raises(ValueError, match=r"kl_coef=0\.5: an agent that gives texts has no log-probabilities"):
        TextActions(gym.make("KnownOptimum-v0", kl_coef=0.5))
    with pytest.raises(ValueError, match=r"observation must be .*messages.*got 'tokens'"):
        TextActions("CopyText-v0", "tokens")  # type: ignore[arg-type]
    env = TextActions("CopyText-v0")
    with pytest.raises(gym.error.ResetNeeded):
        env.step("a")
    env.reset()
    with pytest.raises(ValueError, match="an action of TextActions is a text, got 3"):
        env.step(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no token for 'hello'"):
        env.step("a hello")
    lenient = TextActions("CopyText-v0", unknown="skip")
    lenient.reset(options={"prompt_indices": [0]})
    *_, info = lenient.step("well a then a")
    assert info["completion"].split() == ["a", "a"] and info["score"] == 1.0
    with pytest.raises(ValueError, match="half of a character"):
        env.step("a \ud800")
