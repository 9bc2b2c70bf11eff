"""What agents that learn from pairs share: which completions become a pair, and the losses on a pair.

A rollout of pairs has two rows in each group: the chosen one with score 1, the rejected one with score -1; or with
2p - 1 and 1 - 2p, where a judge says that the chosen one is the better one with probability p (a soft label). With

    h(x, y_w, y_l) = log pi(y_w | x) / pi_ref(y_w | x) - log pi(y_l | x) / pi_ref(y_l | x)

summed over the tokens of each completion, the loss of a pair is one of

    sigmoid   -log sigmoid(beta h)               DPO, Rafailov et al. 2023, arXiv:2305.18290, equation 7
              -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)     with label smoothing e: a share e of the labels
                                                 is taken to be wrong (cDPO, Mitchell 2023)
    ipo       (h - 1 / (2 beta))^2               IPO, Azar et al. 2023, arXiv:2310.12036, equation 17, tau = beta
    hinge     max(0, 1 - beta h)                 SLiC's rank loss (Zhao et al. 2023, arXiv:2305.10425) on log-ratios

Of a soft label each loss is l(h) with probability p, and l(-h) else; label smoothing is p = 1 - e for every pair.

IPO's h is a sum here, as in the paper; TRL divides each log-ratio by its number of tokens, so that its beta is another.

Shape legend: B rows, T response places, N pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge, Lt
from torch import Tensor

from textrl_gym.core import Rollout, StopReason
from textrl_gym.data.ranked import RankedCompletions
from textrl_gym.functional import last_places, mean_of, pad, rows_of_groups, without_noise
from textrl_gym.mdp.text_env import TextVectorEnv
from textrl_gym.mdp.transition import stop_reasons
from textrl_gym.policy.policy import Policy
from textrl_gym.rollouts.collect import collect
from textrl_gym.rollouts.scoring import rollout_logprobs
from textrl_gym.training.agent import Agent
from textrl_gym.training.config import AgentConfig
from textrl_gym.training.minibatch import Minibatch, sum_of

Loss = Literal["sigmoid", "ipo", "hinge"]
Labels = Literal["best", "bradley_terry"]
PAIR_BAR = {
    "train/accuracy": "accuracy {:.2f}",
    "train/reward_margin": "margin {:.2f}",
    "eval/pair_accuracy": "held-out {:.2f}",
    "eval/pair_margin": "margin {:.2f}",
}
"""What the progress bar of an agent shows that learns from given pairs."""


class Pair(NamedTuple):
    """Token ids. In a conversation a token i of the environment is written as -1 - i."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    chance: float = 1.0
    """How likely the chosen one is the better one: more than 0.5."""


@dataclasses.dataclass(frozen=True)
class PairConfig(AgentConfig):
    """Settings of agents that learn from pairs; kl_coef is beta."""

    loss: Loss = "sigmoid"
    """"sigmoid": DPO's; "ipo": a squared distance to 1 / (2 beta); "hinge": nothing beyond a margin of 1 / beta."""
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0
    """The share of labels that is taken to be wrong, for the sigmoid loss."""
    labels: Labels = "best"
    """How the reward makes pairs. "best": the best and the worst completion of a prompt; "bradley_terry": neighbours,
    the first chosen with probability sigmoid(R_1 - R_2), as people do who are less sure of close cases."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing={self.label_smoothing} is for loss='sigmoid', not {self.loss!r}")
        if self.kl_coef == 0:
            raise ValueError("kl_coef is beta, by which log-ratios become rewards: it must be > 0, got 0")


# -- pairs ------------------------------------------------------------------------------------------------------------


def label_pairs(return_B: Tensor, group_B: Tensor, labels: Labels, generator: torch.Generator | None) -> Tensor:
    """Rows (chosen, rejected) of the pairs that returns make, int64 [N, 2].

    "best": a group's best and worst row; a group without any spread but rounding's makes no pair. "bradley_terry": rows
    1 and 2, 3 and 4, ... of a group, each pair in an order drawn with `generator`.
    """
    assert return_B.shape == group_B.shape and return_B.ndim == 1, (return_B.shape, group_B.shape)
    row_GN, mask_GN = rows_of_groups(group_B)
    if labels == "best":
        return_B = without_noise(return_B)
        return_GN = return_B[row_GN]
        best_G = return_GN.masked_fill(~mask_GN, -torch.inf).argmax(1)
        worst_G = return_GN.masked_fill(~mask_GN, torch.inf).argmin(1)
        row_N2 = row_GN.gather(1, torch.stack([best_G, worst_G], 1))
        return row_N2[return_B[row_N2[:, 0]] > return_B[row_N2[:, 1]]]
    pairs = row_GN.shape[1] // 2  # of the largest group; the last row of an odd group has no partner
    row_N2 = row_GN[:, : 2 * pairs].reshape(len(row_GN) * pairs, 2)[mask_GN[:, 1::2].flatten()]
    chance_N = torch.sigmoid(return_B[row_N2[:, 0]] - return_B[row_N2[:, 1]])
    first_N = torch.rand(len(row_N2), generator=generator, device=group_B.device) < chance_N
    return torch.where(first_N[:, None], row_N2, row_N2.flip(1))


def as_pairs(rollout: Rollout, row_N2: Tensor, chance_N: Tensor | None = None) -> Rollout:
    """The rollout of these pairs: neighbouring rows of one group, with the scores of the head of this file.

    Args:
        row_N2: the rows (chosen, rejected) of each pair.
        chance_N: how likely the chosen one is the better one. None: 1 each.
    """
    picked = rollout.select(row_N2.flatten())
    rows = torch.arange(len(picked), device=row_N2.device)
    sign_B = (1 - 2 * (rows % 2)).to(picked.score_B)
    if chance_N is not None:
        sign_B = sign_B * (2 * chance_N.to(sign_B) - 1).repeat_interleave(2)
    reward_BT = torch.zeros_like(picked.reward_BT)
    reward_BT[rows, last_places(picked.mask_BT)] = sign_B
    return dataclasses.replace(picked, group_B=rows // 2, score_B=sign_B, reward_BT=reward_BT)


def pairs_of(compared: Sequence[RankedCompletions]) -> list[Pair]:
    """All pairs of ranked completions, the likelier one as the chosen one; not those that are as likely either way."""
    pairs = []
    for c in compared:
        for (a, b), chance in zip(c.pairs, c.probabilities or [1.0] * len(c.pairs), strict=True):
            # Accuracy and margin count the likelier order as right.
            better, worse = (a, b) if chance > 0.5 else (b, a)
            if chance != 0.5:
                ids = c.completion_ids
                pairs.append(Pair(c.prompt_ids, ids[better], ids[worse], max(chance, 1 - chance)))
    return pairs


def pairs_rollout(env: TextVectorEnv, pairs: Sequence[Pair], device: torch.device) -> Rollout:
    """The rollout of given pairs; log-probabilities, rewards and values are 0."""
    prompt_BP, prompt_mask_BP = pad([pair.prompt for pair in pairs for _ in range(2)], "left")
    texts = [ids for pair in pairs for ids in (pair.chosen, pair.rejected)]
    token_BT, present_BT = pad(texts, "right")
    reply_BT = token_BT < 0
    token_BT, mask_BT = torch.where(reply_BT, -1 - token_BT, token_BT), present_BT & ~reply_BT
    texts = [ids[present].tolist() for ids, present in zip(token_BT, present_BT, strict=True)]
    tensors = {"prompt_BP": prompt_BP, "prompt_mask_BP": prompt_mask_BP, "token_BT": token_BT, "mask_BT": mask_BT}
    names = ("logp_BT", "ref_logp_BT", "kl_BT", "value_BT", "reward_BT")
    tensors |= dict.fromkeys(names, torch.zeros(mask_BT.shape)) | {"score_B": torch.zeros(len(texts))}
    tensors |= {"stop_B": stops_of(env, texts), "group_B": torch.arange(len(texts)) // 2}
    prompts = [env.scorer.codec.decode(pair.prompt, begin=True) for pair in pairs for _ in range(2)]
    completions = [env.scorer.text(ids) for ids in texts]
    if reply_BT.any():
        begins_BT = reply_BT & ~torch.nn.functional.pad(reply_BT, (1, -1))
        turn_BT = (begins_BT.cumsum(1) - reply_BT.long()) * present_BT
        tensors |= {"reply_BT": reply_BT, "turn_BT": turn_BT, "turn_reward_BT": torch.zeros(mask_BT.shape)}
    on_device: dict[str, Any] = {name: tensor.to(device) for name, tensor in tensors.items()}
    rollout = Rollout(**on_device, prompts=prompts, completions=completions)
    chance_N = torch.tensor([pair.chance for pair in pairs], device=device)
    return as_pairs(rollout, torch.arange(len(texts), device=device).view(-1, 2), chance_N)


def stops_of(env: TextVectorEnv, completions: list[list[int]]) -> Tensor:
    """Why each given completion ended, as StopReason. int64 [B]."""
    last_B, length_B = (torch.tensor(x) for x in ([ids[-1] for ids in completions], [*map(len, completions)]))
    hit_B = torch.tensor(env.scorer.stopped(completions)) if env.stop else None
    stop_B = stop_reasons(last_B, length_B, hit_B, env.max_new_tokens, env.end_ids)
    # A completion of a file that no rule ends was ended by what its writer stopped at.
    return torch.where(stop_B == StopReason.RUNNING, StopReason.STOP_STRING.value, stop_B)


def with_logprobs(pairs: Rollout, policy: Policy) -> Rollout:
    """The rollout with its tokens' log-probabilities, now and under the reference."""
    assert policy.reference is not None
    logp_BT, ref_logp_BT = (rollout_logprobs(pairs, one) for one in (policy, policy.reference))
    return dataclasses.replace(pairs, logp_BT=logp_BT, ref_logp_BT=ref_logp_BT)


def sample_pairs(agent: Agent, env: TextVectorEnv, seed: tuple[int, int]) -> list[Pair]:
    """Pairs of one rollout of the reference, labelled by the environment's reward: a function of the seed."""
    rows = env.num_envs
    mdp = env.remake(rows, group_size=2)
    rng = np.random.default_rng(seed)
    generator = torch.Generator(agent.device).manual_seed(int(rng.integers(2**62)))
    # Not the environment's own streams: how many draws there were would change the prompts after a resumption.
    indices = rng.integers(len(mdp.source), size=rows // 2).repeat(2)
    assert agent.policy.reference is not None
    drawn = collect(mdp, agent.policy.reference, kl_coef=0.0, generator=generator, prompt_indices=indices)
    row_N2 = label_pairs(drawn.reward_BT.sum(1), drawn.group_B, agent.config.labels, generator)

    prompt_B = [ids[mask].tolist() for ids, mask in zip(drawn.prompt_BP, drawn.prompt_mask_BP, strict=True)]
    # Whose each token is must be known again where pairs come from a file.
    signed_BT = torch.where(drawn.mask_BT, drawn.token_BT, -1 - drawn.token_BT)
    text_B = [ids[there].tolist() for ids, there in zip(signed_BT, drawn.present_BT, strict=True)]
    return [Pair(prompt_B[a], text_B[a], text_B[b]) for a, b in row_N2.tolist()]


def pair_metrics(agent: Agent, pairs: Rollout) -> dict[str, float]:
    """On given pairs, the share that the policy ranks as they are labelled, and the mean margin of implicit rewards.

    The implicit reward of a completion is beta log pi(y | x) / pi_ref(y | x).
    """
    now = with_logprobs(pairs, agent.policy)
    ratio_B = ((now.logp_BT - now.ref_logp_BT) * now.mask_BT).sum(1)
    margin_N = ratio_B[0::2] - ratio_B[1::2]
    accuracy = float((0.5 + 0.5 * margin_N.sign()).mean())
    return {"pair_accuracy": accuracy, "pair_margin": agent.kl.coef * float(margin_N.mean())}


# -- losses -----------------------------------------------------------------------------------------------------------


def pair_loss(margin_N: Tensor, loss: Loss, beta: float, chance_N: Tensor | float = 1.0) -> Tensor:
    """The loss of each pair, [N], of its difference h of log-ratios; see the head of this file.

    Args:
        margin_N: h of each pair.
        chance_N: how likely the chosen completion is the better one.
    """
    assert margin_N.ndim == 1, margin_N.shape

    def one_sided(h_N: Tensor) -> Tensor:
        if loss == "ipo":
            return (h_N - 1 / (2 * beta)) ** 2
        return F.relu(1 - beta * h_N) if loss == "hinge" else -F.logsigmoid(beta * h_N)

    return chance_N * one_sided(margin_N) + (1 - chance_N) * one_sided(-margin_N)


def pairs_loss(logp_BT: Tensor, part: Minibatch, config: PairConfig, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean over pairs of pair_loss, and metrics.

    A part has whole groups, its rows in any order. score_B is 1 for the chosen row of a group and -1 for the rejected,
    or nearer to 0 for a soft label.
    """
    assert logp_BT.shape == part.mask_BT.shape, (logp_BT.shape, part.mask_BT.shape)
    ratio_B = ((logp_BT - part.ref_logp_BT) * part.mask_BT).sum(1)
    row_N2, _ = rows_of_groups(part.group_B)
    margin_N = (part.score_B.sign() * ratio_B)[row_N2].sum(1)
    pairs, chosen_B = part.rows // 2, part.score_B > 0
    # A rollout has a score for each row and no more: 2p - 1 holds the sign and the probability.
    chance_N = 0.5 + 0.5 * part.score_B.abs()[row_N2[:, 0]]
    # A share of the labels is wrong whatever the judge said of them.
    chance_N = chance_N * (1 - config.label_smoothing) + (1 - chance_N) * config.label_smoothing
    loss = pair_loss(margin_N, config.loss, beta, chance_N).sum() / pairs
    detached_N, detached_B = margin_N.detach(), ratio_B.detach()
    return loss, {
        "loss": loss.detach(),
        "accuracy": (0.5 + 0.5 * detached_N.sign()).sum() / pairs,
        "reward_margin": beta * detached_N.sum() / pairs,
        "chosen_log_ratio": detached_B[chosen_B].sum() / pairs,
        "rejected_log_ratio": detached_B[~chosen_B].sum() / pairs,
    }


BETA = 0.1
"""Where neither a setting nor the task has a KL coefficient, as in their appendix B."""


def learn_pairs(agent: Agent, pairs: Rollout) -> dict[str, float]:
    """An agent's optimizer steps on a rollout of pairs, over its epochs and minibatches; what to log of them."""
    steps = []
    for minibatch in agent.minibatches(pairs):
        parts = []
        for part in minibatch.micro_batches(whole_groups=True):  # the rows of a pair are compared
            loss, metrics = pairs_loss(agent.policy.logprobs(part), part, agent.config, agent.kl.coef)
            loss.backward()
            parts.append(metrics)
        steps.append(sum_of(parts) | {"grad_norm": agent.step()})
    return mean_of(steps)
