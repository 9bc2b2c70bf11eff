"""LoRA and frozen layers: the reference without a copy, nothing else trained, and checkpoints that go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from textrl_gym.agents import GRPO, PPO
from textrl_gym.models import lora, tiny
from textrl_gym.policy.policy import Policy
from textrl_gym.rollouts.collect import collect

SMALL: dict[str, Any] = {"rollout_episodes": 8, "group_size": 4, "learning_rate": 1e-2, "device": "cpu"}


@pytest.fixture
def agent(tmp_path: Path) -> GRPO:
    return GRPO("CopyText-v0", seed=0, lora_rank=4, out=tmp_path / "run", **SMALL)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_lora_starts_as_its_reference_and_only_it_is_trained(agent: GRPO) -> None:
    policy, reference = agent.policy, agent.policy.reference
    assert reference is not None and reference.model is policy.model
    rollout = agent.collect()
    torch.testing.assert_close(policy.logprobs(rollout), rollout.logp_BT, atol=1e-5, rtol=0)
    assert torch.equal(reference.logprobs(rollout), policy.logprobs(rollout))
    before = weights(policy.model)
    for _ in range(3):
        agent.update(agent.collect())
    changed = {name for name, value in policy.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(".lora_" in name for name in changed)
    # The reference is still the start, and the policy is not.
    plain = Policy(GRPO("CopyText-v0", seed=0, **SMALL).policy.model)
    assert (policy.logprobs(rollout) - plain.logprobs(rollout)).abs().max() > 0.1
    torch.testing.assert_close(reference.logprobs(rollout), plain.logprobs(rollout), atol=1e-6, rtol=0)
    assert any(p.requires_grad for p in policy.model.parameters()), "switching it off must leave it trainable"


def test_shared_prompts_and_sampling_see_the_adapter(agent: GRPO) -> None:
    for _ in range(2):
        agent.update(agent.collect())
    rollout = agent.collect()
    torch.testing.assert_close(agent.policy.logprobs(rollout), rollout.logp_BT, atol=2e-5, rtol=0)
    assert agent.policy.trunk.shares_prompts
    whole = agent.policy.model(  # peft's own forward, the first row alone
        input_ids=torch.cat([rollout.prompt_BP[:1], rollout.token_BT[:1]], 1),
        attention_mask=torch.cat([rollout.prompt_mask_BP[:1], rollout.mask_BT[:1]], 1).long(),
        position_ids=torch.cat([rollout.prompt_mask_BP[:1], rollout.mask_BT[:1]], 1).cumsum(1).sub(1).clamp(min=0),
    ).logits[:, rollout.prompt_BP.shape[1] - 1 : -1]
    logp_1T = whole.log_softmax(-1).gather(2, rollout.token_BT[:1, :, None]).squeeze(2) * rollout.mask_BT[:1]
    torch.testing.assert_close(logp_1T, rollout.logp_BT[:1], atol=2e-5, rtol=0)


@pytest.mark.parametrize("by_name", [True, False], ids=["model-by-name", "model-given"])
def test_a_saved_lora_goes_on_as_if_never_stopped(by_name: bool, tmp_path: Path) -> None:
    def make() -> PPO:
        model = None if by_name else PPO("CopyText-v0", seed=5, **SMALL).policy.model
        return PPO("CopyText-v0", model, seed=0, lora_rank=2, separate_value_model=True, **SMALL)

    agent = make()
    for _ in range(2):
        agent.update(agent.collect())
    agent.save(tmp_path / "saved")
    files = {path.name for path in (tmp_path / "saved" / "model").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    assert (tmp_path / "saved" / "base").is_dir() == (not by_name)
    assert not (tmp_path / "saved" / "reference").exists()
    assert str(tmp_path) not in (tmp_path / "saved" / "model" / "adapter_config.json").read_text()
    loaded = PPO.load(tmp_path / "saved", device="cpu")
    assert loaded.policy.reference is not None and loaded.policy.reference.model is loaded.policy.model
    for one in (agent, loaded):
        one.update(one.collect())
    expected = weights(agent.policy)
    found = weights(loaded.policy)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=0, msg=name)
    loaded.save(tmp_path / "again")  # and can be saved again
    assert (tmp_path / "again" / "base").is_dir() == (not by_name)


def test_a_model_given_with_an_adapter_keeps_it() -> None:
    model = lora.add_lora(tiny.gpt2(14, 30), rank=2, alpha=4, seed=1)
    policy = Policy(model, reference="copy")
    assert policy.reference is not None and policy.reference.model is model


def test_frozen_layers_stay_and_are_held_once(tmp_path: Path) -> None:
    agent = GRPO("KnownOptimum-v0", seed=0, frozen_layers=1, **SMALL)
    policy, reference = agent.policy, agent.policy.reference
    assert reference is not None
    before = weights(policy.model)
    for _ in range(2):
        agent.update(agent.collect())
    body = policy.model.model
    frozen = {id(p) for part in (body.embed_tokens, body.layers[0]) for p in part.parameters()}
    assert {id(p) for p in reference.model.parameters()} & {id(p) for p in policy.model.parameters()} == frozen
    after = policy.model.state_dict()
    assert torch.equal(after["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])
    assert not torch.equal(after["model.layers.1.mlp.up_proj.weight"], before["model.layers.1.mlp.up_proj.weight"])
    rollout = collect(agent.env, policy, kl_coef=0.1)
    start = GRPO("KnownOptimum-v0", seed=0, **SMALL).policy
    torch.testing.assert_close(rollout.ref_logp_BT, start.logprobs(rollout), atol=1e-6, rtol=0)
    agent.save(tmp_path / "saved")
    loaded = GRPO.load(tmp_path / "saved", device="cpu")
    assert sum(not p.requires_grad for p in loaded.policy.model.parameters()) == len(frozen)


def test_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="frozen_layers=9 leaves nothing to train: the model has 2 layers"):
        GRPO("KnownOptimum-v0", frozen_layers=9, **SMALL)
    with pytest.raises(ValueError, match="lora_rank=2 freezes the whole model"):
        GRPO("KnownOptimum-v0", frozen_layers=1, lora_rank=2, **SMALL)
    with pytest.raises(ValueError, match="lora_rank must be at least 0, got -1"):
        GRPO("KnownOptimum-v0", lora_rank=-1, **SMALL)
