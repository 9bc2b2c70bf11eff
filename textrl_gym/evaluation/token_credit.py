"""Credit: what an agent says of each token of given texts, so that agents can be laid side by side on the same ones.

Each quantity is of the action that was taken, float32 [B, T], 0 outside the mask:

    kl         log pi - log pi_ref, nats: k1, what the penalty in the reward is made of; it may be negative
    ratio      pi / pi_ref = exp(kl)
    entropy    of the distribution that the action was taken from, nats
    value      the critic's V before the action, of agents that have one
    advantage  what the agent's loss would weigh the action by, of agents that have such a weight (Agent.advantages)

The texts are the reference's: groups of its completions of held-out prompts, sampled with random numbers that
depend on the seed alone, so that all agents of a comparison meet the same ones. Each agent reads them teacher-forced,
as if it had written them; its KL penalty is its own. Advantages that are centred or scaled are so over these texts.

Shape legend: B rows, T response places.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from os.path import commonprefix
from typing import Protocol

import torch
from torch import Tensor

from textrl_gym.core import Rollout, StopReason
from textrl_gym.evaluation.evaluator import Player
from textrl_gym.kl import KLPenalty
from textrl_gym.mdp.text_env import TextVectorEnv
from textrl_gym.rollouts.collect import complete, rollout_of
from textrl_gym.rollouts.scoring import rescore, token_entropy

PROMPTS = 6
GROUP = 8  # GRPO's default, so that a group's mean is as noisy here as in training
QUANTITIES = ("advantage", "value", "kl", "entropy", "ratio")
LARGEST_LOG = 80.0
"""Its exponential is still a float32."""


class CreditedPlayer(Player, Protocol):
    """An agent that says how its loss would weigh each token."""

    @property
    def kl(self) -> KLPenalty: ...

    def shaped(self, rollout: Rollout) -> Rollout: ...
    def advantages(self, rollout: Rollout) -> Tensor | None: ...


class TokenDecoder(Protocol):
    """What is used of a tokenizer."""

    def decode(
        self, token_ids: list[int], /, *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str | list[str]: ...


def token_credit(agent: CreditedPlayer, rollout: Rollout) -> dict[str, Tensor]:
    """Quantity -> [B, T], of those above that the agent has. The rollout's texts may be anyone's, in whole groups."""
    # The rollout holds the log-probabilities of who wrote the texts, the reference; here the agent's own are wanted.
    coef = agent.kl.coef_in_reward
    own = rescore(agent.policy, rollout, agent.env, kl_coef=coef)
    log_ratio_BT = (own.logp_BT - own.ref_logp_BT) * own.mask_BT
    credit = {
        "kl": log_ratio_BT,
        "entropy": token_entropy(own, agent.policy),
        "ratio": log_ratio_BT.clamp(max=LARGEST_LOG).exp() * own.mask_BT,
    }
    if agent.policy.value_head is not None:
        credit["value"] = own.value_BT * own.mask_BT
    advantage_BT = agent.advantages(agent.shaped(own))
    if advantage_BT is not None:
        credit["advantage"] = advantage_BT * own.mask_BT
    return {name: credit[name] for name in QUANTITIES if name in credit}


def start_texts(agent: Player, mdp: TextVectorEnv, indices: Sequence[int], seed: int) -> Rollout:
    """A group of the reference's completions of each prompt, scored by the environment's reward.

    Args:
        mdp: a text vector environment with the prompts.
        indices: which prompts.
        seed: of the random numbers.
    """
    reference = agent.policy.reference
    if reference is None:
        raise ValueError("the policy has no reference model, whose texts these are")
    # Whole groups, since the advantages of agents that compare completions are of a group.
    groups = mdp.remake(len(indices) * GROUP, group_size=GROUP)
    rows, prompt_ids = groups.draw([index for index in indices for _ in range(GROUP)])
    generator = torch.Generator(reference.device).manual_seed(seed)
    shape = (len(rows), groups.max_new_tokens)
    uniform_BT = torch.rand(shape, generator=generator, device=reference.device)
    out = complete(groups, reference, rows, prompt_ids, uniform_BT)
    return rollout_of(groups, reference, rows, prompt_ids, out)


def pieces(tokenizer: TokenDecoder, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text of all; put together they are the text, without special tokens.

    A token that is a part of a character adds nothing, and the last one of it the character.
    """

    def text(count: int) -> str:
        words = tokenizer.decode(list(ids[:count]), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(words, str)  # a list of texts is what a batch of token ids would give
        return words

    # Decoding token by token would lose spaces and characters that bytes of several tokens make together, so each piece
    # is what the text of one token more agrees on with the whole text, beyond what was there before.
    whole, texts, done = text(len(ids)), [], 0
    for count in range(1, len(ids) + 1):
        now = len(whole) if count == len(ids) else max(done, len(commonprefix([text(count), whole])))  # noqa: RUF071
        texts.append(whole[done:now])
        done = now
    return texts


def lines(agent: CreditedPlayer, mdp: TextVectorEnv, indices: Iterable[int], seed: int) -> list[str]:
    """A JSON object for the best and the worst text of each prompt: tokens, scores, what the agent says of each token.

    Args:
        mdp: a text vector environment with held-out prompts.
        indices: of the prompts, of which the first few are taken.
        seed: of the texts.
    """
    # A prompt may be drawn twice where there are fewer prompts than episodes.
    chosen = list(dict.fromkeys(int(index) for index in indices))[:PROMPTS]
    rollout = start_texts(agent, mdp, chosen, seed)
    credit = token_credit(agent, rollout)
    scores, stops, lengths = rollout.score_B.tolist(), rollout.stop_B.tolist(), rollout.present_BT.sum(1).tolist()
    rows = []
    for group, index in enumerate(chosen):
        of_group = range(group * GROUP, (group + 1) * GROUP)
        ranked = sorted(of_group, key=lambda row: -scores[row])
        # By the score that is trained on: where they differ most, credit has most to say.
        for row in (ranked[0], ranked[-1]):
            record = {
                "index": index,
                "prompt": rollout.prompts[row],
                "completion": rollout.completions[row],
                "tokens": pieces(mdp.tokenizer, rollout.token_BT[row, : lengths[row]].tolist()),
                "stop_reason": StopReason(stops[row]).name,
                "score": scores[row],
                "group_scores": [rounded(scores[other]) for other in of_group],
            }
            record |= {name: [rounded(x) for x in x_BT[row, : lengths[row]].tolist()] for name, x_BT in credit.items()}
            rows.append(json.dumps(record))
    return rows


def rounded(x: float) -> float | None:
    """To four digits; None for what JSON has no word for."""
    return float(f"{x:.4g}") if math.isfinite(x) else None
