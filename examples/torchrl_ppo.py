"""TorchRL's PPO on a text environment, with the KL penalty to the initial policy in the reward.

pip install '.[torchrl]'
python examples/torchrl_ppo.py
"""

import sys
from typing import Any

import torch
from tensordict.nn import ProbabilisticTensorDictModule as Sampler
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.modules import ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from textrl_gym.integrations.torchrl import TorchRLEnv

OBSERVATION = ["input_ids", "attention_mask"]


class NextToken(nn.Module):
    """A causal LM's logits for the next token, or the value of the state by a linear head on the same body."""

    def __init__(self, model: Any, value: bool = False) -> None:
        super().__init__()
        self.body, self.head = model.model, nn.Linear(model.config.hidden_size, 1) if value else model.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        shape, mask = input_ids.shape[:-1], attention_mask.flatten(0, -2).long()
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        hidden = self.body(input_ids.flatten(0, -2), mask, position_ids=position).last_hidden_state
        last = (mask * torch.arange(mask.shape[-1])).argmax(-1)  # padding is at both ends
        return self.head(hidden[torch.arange(len(hidden)), last]).unflatten(0, shape)


def main(env_id: str = "KnownOptimum-v0", *, frames: int = 12_288) -> tuple[float, float]:
    torch.manual_seed(0)
    env = TorchRLEnv(env_id, num_envs=64, kl_coef=0.05)
    env.set_seed(0)
    model = env.mdp.task.load_model()
    logits = TensorDictModule(NextToken(model), in_keys=OBSERVATION, out_keys=["logits"])
    categorical = torch.distributions.Categorical
    sample = Sampler(["logits"], ["action"], distribution_class=categorical, return_log_prob=True)
    actor = ProbabilisticTensorDictSequential(logits, sample)
    critic = ValueOperator(NextToken(env.mdp.task.load_model(), value=True), in_keys=OBSERVATION)
    loss = ClipPPOLoss(actor, critic, entropy_bonus=False)
    advantage = GAE(gamma=1.0, lmbda=1.0, value_network=critic, deactivate_vmap=True)
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-3)
    scores = []
    for batch in Collector(
        env, actor, frames_per_batch=768, total_frames=frames, auto_register_policy_transforms=False
    ):
        ended = batch["next", "done"]
        scores.append(batch["next", "score"][ended].mean().item())
        for _ in range(2):
            advantage(batch)
            losses = loss(batch.reshape(-1))
            optimizer.zero_grad()
            (losses["loss_objective"] + losses["loss_critic"]).backward()
            optimizer.step()
    print(
        f"score {scores[0]:.3f} at first, {scores[-1]:.3f} after {frames} tokens; KL {batch['next', 'kl'].mean():.3f}"
    )
    return scores[0], scores[-1]


if __name__ == "__main__":
    main(*sys.argv[1:2])
