"""Cached decoding: unique prompts are prefilled once, finished rows leave the batch, log-probabilities are kept.

Shape legend: U unique prompts, B rows, P prompt places, T response places, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from textrl_gym import functional
from textrl_gym.core import Message, StopReason
from textrl_gym.mdp.transition import stop_reasons
from textrl_gym.policy.policy import Policy
from textrl_gym.rollouts.dialogues import Dialogues

POLL_EVERY = 8  # on a GPU, tokens between two questions "has every row ended?": each one waits for the device


@dataclass(frozen=True)
class Completions:
    """B sampled completions; 0 outside the mask, which includes the final EOS."""

    token_BT: Tensor
    mask_BT: Tensor
    logp_BT: Tensor
    value_BT: Tensor
    """V before each action, of a critic that shares the policy's trunk; else 0."""
    stop_B: Tensor
    reply_BT: Tensor | None = None
    """Of conversations, as turn_BT, turn_reward_BT and turns, the fields of a Rollout."""
    turn_BT: Tensor | None = None
    turn_reward_BT: Tensor | None = None
    turns: list[list[Message]] = field(default_factory=list)
    sampler_logp_BT: Tensor | None = None
    """logp_BT, where a rollout server has sampled and not the policy itself; see Rollout."""

    def to(self, device: torch.device) -> Completions:
        """The same with its tensors on a device."""
        moved = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)  # type: ignore[arg-type] # tensors in the places of tensors


class Sampler(Protocol):
    """What completes prompts: `generate`, or the method of a rollout server that has its arguments."""

    def __call__(
        self,
        policy: Policy,
        prompt_UP: Tensor,
        prompt_mask_UP: Tensor,
        source_B: Tensor,
        uniform_BT: Tensor | None,
        *,
        max_new_tokens: int,
        end_ids: Sequence[int],
        stopped: Callable[[list[list[int]]], list[bool]] | None = None,
        dialogues: Dialogues | None = None,
    ) -> Completions: ...


@torch.no_grad()
def generate(
    policy: Policy,
    prompt_UP: Tensor,
    prompt_mask_UP: Tensor,
    source_B: Tensor,
    uniform_BT: Tensor | None,
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    stopped: Callable[[list[list[int]]], list[bool]] | None = None,
    dialogues: Dialogues | None = None,
) -> Completions:
    """Sample one completion for each row, token by token from the full softmax at the policy's temperature.

    Args:
        prompt_UP, prompt_mask_UP: int64 and bool, left-padded, each unique prompt once.
        source_B: int64, which unique prompt a row answers.
        uniform_BT: float in [0, 1), T >= max_new_tokens: number [b, t] decides token t of row b. None: greedy.
        max_new_tokens: the budget of every row.
        end_ids: the tokens that end a row; they are part of the completion.
        stopped: asked at each token whether the rows' tokens so far complete a stop string (Scorer.completes_stop).
        dialogues: of conversations, in which the environment says when turns and rows end, and not end_ids and stopped.

    Returns:
        Completions with T = max_new_tokens.
    """
    device, rows = policy.device, len(source_B)
    written = _Written.empty(rows, max_new_tokens, device)
    rule = _SingleTurn(rows, max_new_tokens, end_ids, stopped) if dialogues is None else dialogues

    # 1. Prefill each unique prompt once.
    decoder = policy.decoder(prompt_UP, prompt_mask_UP.bool(), source_B, max_new_tokens)
    row_b, hidden_bD = torch.arange(rows, device=device), decoder.first_BD

    for t in range(max_new_tokens):
        # 2. Choose a token for every row still in the batch (row_b); rows that ended since the last poll are ignored.
        logp_bV = policy.logits(hidden_bD).log_softmax(-1)
        token_b = logp_bV.argmax(-1) if uniform_BT is None else functional.inverse_cdf(logp_bV, uniform_BT[row_b, t])
        alive_b = written.stop_B[row_b] == StopReason.RUNNING
        token_b = rule.forced(written.token_BT, row_b, t, token_b)
        value_b = policy.value_of(hidden_bD) if policy.shares_trunk else None
        written.append_(row_b, t, alive_b, token_b, logp_bV.gather(1, token_b[:, None]).squeeze(1), value_b)

        # 3. Who ended with this token?
        written.end_(row_b, t, alive_b, rule.reasons(written.token_BT, row_b, t, alive_b, token_b))
        if t == max_new_tokens - 1:
            break  # nobody would read another step's hidden states

        # 4. Finished rows leave the batch.
        if device.type == "cpu" or t % POLL_EVERY == POLL_EVERY - 1:
            keep_k = (written.stop_B[row_b] == StopReason.RUNNING).nonzero().squeeze(1)
            if len(keep_k) == 0:
                break
            # Moving the caches of those that stay costs too: a decoder says from which share of leavers on it pays.
            if len(keep_k) < len(row_b) and len(keep_k) <= (1 - decoder.compaction_threshold) * len(row_b):
                decoder.keep(keep_k)
                row_b, token_b = row_b[keep_k], token_b[keep_k]

        hidden_bD = decoder.step(token_b)  # 5. One more position for each row.
    return written.completions(dialogues)


def sampled_elsewhere(
    ids: Sequence[Sequence[int]],
    logps: Sequence[Sequence[float]],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    stopped: Callable[[list[list[int]]], list[bool]] | None = None,
) -> Completions:
    """Completions of tokens that a server has sampled, each cut where the stop rule ends it. On the CPU.

    Args:
        ids, logps: of each row, its tokens and their log-probabilities.
        max_new_tokens, end_ids, stopped: as of `generate`.

    Raises:
        ValueError: the tokens of a row come to no end.
    """
    token_BT, there_BT = functional.pad(ids, "right")
    logp_BT = torch.zeros(token_BT.shape).masked_scatter(there_BT, torch.tensor([x for row in logps for x in row]))
    written = _Written.empty(len(ids), max_new_tokens, token_BT.device)
    rule = _SingleTurn(len(ids), max_new_tokens, end_ids, stopped)
    for t in range(min(token_BT.shape[1], max_new_tokens)):
        row_b = ((written.stop_B == StopReason.RUNNING) & there_BT[:, t]).nonzero().squeeze(1)
        if len(row_b) == 0:
            break
        alive_b, token_b = torch.ones_like(row_b, dtype=torch.bool), token_BT[row_b, t]
        written.append_(row_b, t, alive_b, token_b, logp_BT[row_b, t], None)
        written.end_(row_b, t, alive_b, rule.reasons(written.token_BT, row_b, t, alive_b, token_b))
    for row in (written.stop_B == StopReason.RUNNING).nonzero().flatten().tolist():
        raise ValueError(f"the completion of row {row} breaks off after {len(ids[row])} of {max_new_tokens} tokens")
    completions = written.completions(None)
    return replace(completions, sampler_logp_BT=completions.logp_BT)


class _SingleTurn:
    """Which tokens are given and why rows end, where nobody speaks but the agent; `Dialogues` says the same."""

    def __init__(
        self,
        rows: int,
        max_new_tokens: int,
        end_ids: Sequence[int],
        stopped: Callable[[list[list[int]]], list[bool]] | None,
    ) -> None:
        self.max_new_tokens, self.end_ids, self.stopped = max_new_tokens, end_ids, stopped
        self.texts: list[list[int]] = [[] for _ in range(rows)]  # on the host, and only where stop strings are sought

    def forced(self, token_BT: Tensor, row_b: Tensor, t: int, token_b: Tensor) -> Tensor:
        return token_b

    def reasons(self, token_BT: Tensor, row_b: Tensor, t: int, alive_b: Tensor, token_b: Tensor) -> Tensor:
        hit_b = None if self.stopped is None else self._stop_hits(self.stopped, row_b, token_b)
        return stop_reasons(token_b, torch.full_like(token_b, t + 1), hit_b, self.max_new_tokens, self.end_ids)

    def _stop_hits(self, stopped: Callable[[list[list[int]]], list[bool]], row_b: Tensor, token_b: Tensor) -> Tensor:
        """Append each row's token to its text, and ask which texts complete a stop string. bool [b]."""
        running = row_b.tolist()
        for row, token in zip(running, token_b.tolist(), strict=True):
            self.texts[row].append(token)
        return torch.tensor(stopped([self.texts[row] for row in running]), device=token_b.device)


@dataclass
class _Written:
    """What B rows have been given so far. Methods take b of the rows, those still in the batch, by their numbers."""

    token_BT: Tensor
    logp_BT: Tensor
    value_BT: Tensor
    stop_B: Tensor
    length_B: Tensor

    @classmethod
    def empty(cls, rows: int, places: int, device: torch.device) -> _Written:
        shape = (rows, places)
        return cls(
            token_BT=torch.zeros(shape, dtype=torch.long, device=device),
            logp_BT=torch.zeros(shape, device=device),
            value_BT=torch.zeros(shape, device=device),
            stop_B=torch.full((rows,), StopReason.RUNNING.value, device=device),
            length_B=torch.full((rows,), places, device=device),
        )

    def append_(
        self, row_b: Tensor, t: int, alive_b: Tensor, token_b: Tensor, logp_b: Tensor, value_b: Tensor | None
    ) -> None:
        """Token t of the rows that run. By torch.where and not by picking them: a GPU need not wait for a count."""
        self.token_BT[row_b, t] = torch.where(alive_b, token_b, 0)
        self.logp_BT[row_b, t] = torch.where(alive_b, logp_b.float(), 0.0)
        if value_b is not None:
            self.value_BT[row_b, t] = value_b  # of ended rows too, which the mask takes out at the end

    def end_(self, row_b: Tensor, t: int, alive_b: Tensor, reason_b: Tensor) -> None:
        """Why the rows that ran have ended with token t; RUNNING where they have not."""
        self.stop_B[row_b] = torch.where(alive_b, reason_b, self.stop_B[row_b])
        ended_b = alive_b & (reason_b != StopReason.RUNNING)
        self.length_B[row_b] = torch.where(ended_b, t + 1, self.length_B[row_b])

    def completions(self, dialogues: Dialogues | None) -> Completions:
        """The completions, with 0 behind the end of each."""
        mask_BT = torch.arange(self.token_BT.shape[1], device=self.length_B.device) < self.length_B[:, None]
        token_BT = self.token_BT * mask_BT
        if dialogues is None:
            return Completions(token_BT, mask_BT, self.logp_BT * mask_BT, self.value_BT * mask_BT, self.stop_B)
        # What was computed where the environment speaks is nobody's.
        mask_BT &= ~dialogues.reply_BT
        return Completions(
            token_BT,
            mask_BT,
            self.logp_BT * mask_BT,
            self.value_BT * mask_BT,
            self.stop_B,
            reply_BT=dialogues.reply_BT,
            turn_BT=dialogues.turn_BT,
            turn_reward_BT=dialogues.turn_reward_BT,
            turns=[conversation.turns for conversation in dialogues.conversations],
        )
