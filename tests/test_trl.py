"""Text environments in TRL's GRPOTrainer: its reward function, and conversations by tool calls."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
import transformers
from conversations import Halving

import textrl_gym  # noqa: F401 - registers the environments
from textrl_gym.core import StopReason
from textrl_gym.mdp.text_env import TextEnv, vector_env
from textrl_gym.models.tokenizer import train_tokenizer

trl: Any = pytest.importorskip("trl", reason="needs TRL: pip install '.[trl]'")

from textrl_gym.integrations.trl import OVER, environment_factory, prompts, reward_function  # noqa: E402

CALL = '<tool_call>\n{"name": "say", "arguments": {"message": "b"}}\n</tool_call>'


def stepped(env: Any, row: int, ids: list[int]) -> tuple[float, StopReason]:
    """The return of tokens stepped one by one, and why the episode ended."""
    env.reset(options={"prompt_indices": [row]})
    total = 0.0
    for token in ids:
        _, reward, terminated, truncated, info = env.step(token)
        total += reward
        if terminated or truncated:
            return total, info["stop_reason"]
    raise AssertionError("the tokens end before the episode")


def test_the_reward_is_that_of_stepping() -> None:
    env: Any = gym.make("CopyText-v0", missing_eos_penalty=0.25)
    mdp = vector_env(env)
    ids = [
        [1, 2, mdp.eos_id],
        [mdp.eos_id],
        [2] * mdp.max_new_tokens,
        [3] * (mdp.max_new_tokens + 4),
        [1, mdp.eos_id, 2],
    ]
    rows = [0, 1, 2, 3, 0]
    expected = [stepped(env, row, of_row) for row, of_row in zip(rows, ids, strict=True)]
    assert {reason for _, reason in expected} == {StopReason.EOS, StopReason.LENGTH}
    scores = reward_function(env)(completion_ids=ids, row=rows, completions=[""] * 5)
    assert scores == pytest.approx([total for total, _ in expected], rel=0, abs=1e-6)


def test_prompts() -> None:
    data = prompts("CopyText-v0")
    source = vector_env("CopyText-v0", num_envs=1).source
    assert (data["prompt"][3], data["row"][3], len(data)) == (source[3]["prompt"], 3, len(source))
    spoken = prompts(TextEnv(task=Halving), rows=2)  # conversations, so that TRL tells the model of its tool
    assert spoken["prompt"] == [[{"role": "user", "content": "b"}], [{"role": "user", "content": "c"}]]
    with pytest.raises(ValueError, match="rows must be 1 to 3, got 4"):
        prompts(TextEnv(task=Halving), rows=4)
    with pytest.raises(ValueError, match="Halving is a conversation: give TRL environment_factory"):
        reward_function(TextEnv(task=Halving))


def test_an_environment_of_turns() -> None:
    env: Any = environment_factory(TextEnv(task=Halving))()
    assert env.reset(row=0) is None and env.get_reward() == 0
    assert [env.say("c"), env.say("a"), env.say("a")] == ["lower", "yes", OVER]
    assert env.get_reward() == 1.0
    env.reset(row=1, prompt="a column of the data")
    assert (env.say(""), env.get_reward()) == ("yes", -0.25)
    with pytest.raises(ValueError, match=r"kl_coef=0\.1"):
        environment_factory("CopyText-v0", kl_coef=0.1)


class Caller(transformers.LlamaForCausalLM):
    """Calls the tool with "b", ends its turn, and begins again, whatever it was answered."""

    call_id = end_id = 0

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids, **kwargs)
        ids = input_ids[:, -output.logits.shape[1] :]
        wanted = torch.where(ids == self.call_id, self.end_id, self.call_id)
        output.logits = output.logits + 30 * torch.nn.functional.one_hot(wanted, output.logits.shape[-1])
        return output


def caller() -> tuple[Caller, Any]:
    """A tiny model and a tokenizer with the chat template of Qwen3."""
    tokenizer = train_tokenizer(["You may call one or more functions"], 300)
    tokenizer.model_max_length = 10_000
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens([CALL])
    tokenizer.eos_token = "<|im_end|>"
    templates = Path(trl.__file__).parent / "chat_templates"
    tokenizer.chat_template = (templates / "qwen3.jinja").read_text(encoding="utf-8")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=4096, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )  # fmt: skip
    model = Caller(config)
    ids: Any = tokenizer.convert_tokens_to_ids([CALL, "<|im_end|>"])
    model.call_id, model.end_id = ids
    return model, tokenizer


@pytest.mark.filterwarnings("default")  # of TRL and transformers
def test_trls_trainer_has_conversations(tmp_path: Path) -> None:
    model, tokenizer = caller()
    env, made = TextEnv(task=Halving), []
    make = environment_factory(env)

    def remember() -> Any:
        made.append(make())
        return made[-1]

    settings = trl.GRPOConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=6, num_generations=2, max_completion_length=200,
        max_tool_calling_iterations=4, report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=1, beta=0.0,
        gradient_checkpointing=False, learning_rate=0.1,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model, train_dataset=prompts(env), environment_factory=remember, args=settings, processing_class=tokenizer
    )
    trainer.train()
    # "b" is right in one of three rows, at the first turn; in the others it is said until the turns are over.
    assert len(made) == 6
    assert sorted(one.get_reward() for one in made) == [0.0] * 4 + [1.0] * 2
    log = next(entry for entry in trainer.state.log_history if "reward" in entry)
    assert log["reward"] == pytest.approx(1 / 3, rel=0, abs=1e-6)
    assert log["tools/call_frequency"] > 1


@pytest.mark.filterwarnings("default")
def test_trls_trainer_learns_a_task_of_one_turn(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(root / "examples"))
    before, after = importlib.import_module("trl_grpo").main(steps=12)
    assert after > before
