"""Tokens that end an episode: all that the model declares, special tokens as stop strings, and what rewards see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from textrl_gym.agents import DPO, GRPO
from textrl_gym.core import StopReason
from textrl_gym.data.encoding import end_ids
from textrl_gym.envs.tldr_summarize import TLDRSummarize
from textrl_gym.evaluation import health
from textrl_gym.evaluation.evaluator import Evaluator
from textrl_gym.integrations.sb3_env import TextVecEnv
from textrl_gym.mdp.text_env import TextVectorEnv, vector_env
from textrl_gym.models import loading
from textrl_gym.policy.policy import Policy
from textrl_gym.rollouts.collect import collect

BUDGET = 8
NAMES = ["<|end|>", "<think>", "</think>"]


def chat_tokenizer() -> Any:
    tokenizer = TLDRSummarize().load_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": NAMES})
    return tokenizer


TOKENIZER = chat_tokenizer()
EOS = 0
END, THINK, NO_THINK = (int(TOKENIZER.convert_tokens_to_ids(name)) for name in NAMES)


def chat_model(share: float, declared: int | list[int]) -> Any:
    """A model that writes <|end|> with about this probability wherever it is."""
    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=len(TOKENIZER), num_attention_heads=1, eos_token_id=0, **size)
    model = LlamaForCausalLM(config)
    model.lm_head = torch.nn.Linear(16, len(TOKENIZER))
    model.lm_head.weight.data.zero_()
    model.lm_head.bias.data.zero_()
    model.lm_head.bias.data[END] = float(np.log(share / (1 - share) * (len(TOKENIZER) - 1)))
    model.generation_config = GenerationConfig(eos_token_id=declared)
    return model


def make(rows: int = 1, **settings: Any) -> TextVectorEnv:
    common: dict[str, Any] = {"tokenizer": TOKENIZER, "reward": "length", "max_new_tokens": BUDGET}
    modes: dict[str, Any] = {"autoreset_mode": "DISABLED"}
    return TextVectorEnv(rows, task=TLDRSummarize, **(common | modes | settings))


def write(env: TextVectorEnv, ids: list[int]) -> tuple[int, dict[str, Any]]:
    """How many of the tokens were taken until the episode ended, and its last information."""
    env.reset(seed=0)
    for taken, token in enumerate(ids, 1):
        *_, infos = env.step(np.array([token]))
        if "stop_reason" in infos:
            return taken, {name: values[0] for name, values in infos.items()}
    return len(ids), {}


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


# -- what the model declares ------------------------------------------------------------------------------------------


def test_episodes_end_where_generate_ends() -> None:
    model = chat_model(0.5, [EOS, END])
    agent = GRPO(make(64, group_size=4), model=model, seed=0)
    assert agent.env.end_ids == (EOS, END)
    rollout = agent.collect()
    ended_B = (rollout.token_BT == END).any(1)
    assert ended_B.float().mean() > 0.9  # 1 - 2^-8 of rows, where none ended before
    assert (rollout.stop_B == torch.where(ended_B, StopReason.EOS, StopReason.LENGTH)).all()
    # Of each row the first <|end|> is its last token, and transformers ends there, too (greedy: it draws otherwise).
    last_B = rollout.mask_BT.sum(1) - 1
    assert ((rollout.token_BT == END).long().argmax(1)[ended_B] == last_B[ended_B]).all()
    given = torch.tensor([[5, 6, 7]])
    assert model.generate(given, max_new_tokens=BUDGET, do_sample=False).shape[1] == 3 + 1
    greedy = collect(agent.env, agent.policy, greedy=True)
    assert greedy.mask_BT.sum(1).tolist() == [1] * 64


def test_an_agents_environments_end_alike(tmp_path: Path) -> None:
    agent = GRPO(make(8, group_size=4), model=chat_model(0.5, [EOS, END]), seed=0, out=tmp_path)
    assert all(line.ok for line in health.card(agent.policy, agent.collect(), agent.env.end_ids, fresh=True)[:4])
    assert Evaluator(agent.env, 4).mdp.end_ids == (EOS, END)
    agent.save(tmp_path / "saved")
    assert GRPO.load(tmp_path / "saved").env.end_ids == (EOS, END)
    agent.set_env(make(8, group_size=4))
    assert agent.env.end_ids == (EOS, END)
    assert GRPO(make(8, group_size=4, eos_token_id=EOS), model=agent.policy.model).env.end_ids == (EOS,)


def test_the_health_card_counts_every_end() -> None:
    env, policy = make(8), Policy(chat_model(0.5, [EOS, END]))
    env.end_as(policy.model)
    rollout = collect(env, policy, generator=torch.Generator().manual_seed(0))
    assert (rollout.token_BT == END).any()
    right, wrong = ({line.name: line.ok for line in health.card(policy, rollout, ends, fresh=False)}
                    for ends in (env.end_ids, (EOS,)))  # fmt: skip
    assert (right["EOS counted once"], wrong["EOS counted once"]) == (True, False)


def test_stepping_is_collecting_with_several_ends() -> None:
    policy = Policy(chat_model(0.3, [EOS, END]))
    env = make(8, stop=["<think>"])
    env.end_as(policy.model)
    uniform_BT = torch.rand((8, BUDGET), generator=torch.Generator().manual_seed(3))
    observation, _ = env.reset(seed=0)
    stop_B, score_B = [0] * 8, [0.0] * 8
    for t in range(BUDGET):
        token_B, _ = policy.act(observation, uniform_B=uniform_BT[:, t])
        alive = [b for b in range(8) if not stop_B[b]]
        if not alive:
            break
        observation, *_, infos = make_step(env, token_B)
        for b in alive:
            if "_stop_reason" in infos and infos["_stop_reason"][b]:
                stop_B[b], score_B[b] = infos["stop_reason"][b], infos["score"][b]
    env.streams_of_prompts.seed(0)
    rollout = collect(env, policy, uniform_BT=uniform_BT)
    assert rollout.stop_B.tolist() == stop_B
    assert rollout.score_B.tolist() == score_B
    assert len(set(stop_B)) > 1


def make_step(env: TextVectorEnv, token_B: torch.Tensor) -> Any:
    """A step in which rows that have ended are left as they are."""
    env.over_B = np.zeros(env.num_envs, bool)
    return env.step(token_B.numpy())


def test_a_folder_declares_its_ends(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    assert make(tokenizer=str(tmp_path)).end_ids == (EOS,)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": END}))
    assert make(tokenizer=str(tmp_path)).end_ids == (EOS, END)
    assert make(tokenizer=loading.load_tokenizer(tmp_path)).end_ids == (EOS, END)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [END, THINK]}))
    env = gym.make("TLDRSummarize-v0", tokenizer=str(tmp_path), reward="length", max_new_tokens=3)
    assert vector_env(env).end_ids == (EOS, END, THINK)
    taken, infos = write(vector_env(env), [*ids_of(" a"), END])
    assert (taken, infos["stop_reason"], infos["completion"]) == (2, StopReason.EOS, " a")


def test_only_special_and_added_tokens_end() -> None:
    # LlamaConfig's default is 2, which is a letter here.
    size: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    assert loading.declared_ends(LlamaForCausalLM(LlamaConfig(vocab_size=9, num_attention_heads=1, **size))) == [2]
    assert end_ids(TOKENIZER, [2, END, 10**6]) == (EOS, END)
    tokenizer = chat_tokenizer()
    tokenizer.add_tokens(["<|turn|>"])  # added, and not special
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    assert end_ids(tokenizer, [turn]) == (EOS, turn)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<0x0A>"]})
    assert end_ids(tokenizer, [tokenizer.convert_tokens_to_ids("<0x0A>")]) == (EOS,)


@pytest.mark.parametrize("chosen", [[], 5, [END, 5], [-1], [10**6], True, "0", 1.5, [[END]]])
def test_ends_that_cannot_be(chosen: Any) -> None:
    with pytest.raises(ValueError, match="eos_token_id"):
        make(eos_token_id=chosen)


def test_chosen_ends() -> None:
    env = make(eos_token_id=[END])
    assert (env.end_ids, env.eos_id) == ((END,), END)
    assert write(env, [EOS, END])[0] == 2


def test_stable_baselines3_ends_alike() -> None:
    env = TextVecEnv(make(2, eos_token_id=[EOS, END]))
    env.reset()
    _, _, done_B, infos = env.step(np.array([END, THINK]))
    assert done_B.tolist() == [True, False]
    assert (infos[0]["stop_reason"], infos[0]["TimeLimit.truncated"]) == (StopReason.EOS, False)


# -- special tokens as stop strings, and in the reward's text ---------------------------------------------------------


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("stop", ["<|stop|>", " b<|stop|>"])
def test_a_special_token_is_a_stop_string(special: bool, stop: str) -> None:
    tokenizer = chat_tokenizer()
    tokenizer.add_tokens(["<|stop|>"], special_tokens=special)
    token = tokenizer.convert_tokens_to_ids("<|stop|>")
    env = make(tokenizer=tokenizer, stop=stop)
    taken, infos = write(env, [*ids_of(" a"), token, *ids_of(" b"), token, *ids_of(" c")])
    assert infos["stop_reason"] is StopReason.STOP_STRING
    if stop == "<|stop|>":
        assert (taken, infos["completion"]) == (2, " a")
    else:
        assert (taken, infos["completion"].replace("<|stop|>", "")) == (4, " a")


def test_rewards_may_see_special_tokens() -> None:
    seen = []

    def tags(completions: list[str], **columns: Any) -> list[float]:
        seen.extend(completions)
        return [0.0] * len(completions)

    ids = [THINK, *ids_of(" so"), NO_THINK, TOKENIZER.pad_token_id, *ids_of(" a"), EOS]
    for skip in (True, False):
        write(make(reward=tags, skip_special_tokens=skip), ids)
    assert seen == [" so a", "<think> so</think> a"]
    with pytest.raises(ValueError, match=r"skip_special_tokens must be .*, got 'no'"):
        make(skip_special_tokens="no")


# -- pairs ------------------------------------------------------------------------------------------------------------


def test_pairs_of_conversations_end_as_the_template_ends_them(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<think>{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<think>{% endif %}"
    )
    rows = []
    for number in range(4):
        texts = (
            [{"role": "user", "content": f"Why {number}?"}],
            *([{"role": "assistant", "content": text}] for text in ("So<|end|>.", "No")),
        )
        rows.append(dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    agent = DPO(make(4, tokenizer=tokenizer, max_new_tokens=20), model=chat_model(0.5, [EOS, END]),
                pairs=str(tmp_path), kl_coef=0.1)  # fmt: skip
    rollout = agent.collect()
    assert rollout.stop_B.tolist() == [StopReason.EOS] * 4
    for row in range(4):
        ids = rollout.token_BT[row][rollout.mask_BT[row]].tolist()
        assert ids[-1] == END and ids.count(END) == 1
        assert rollout.prompt_BP[row, -1] == THINK
    assert set(rollout.completions) == {"So<|end|>.", "No"}
