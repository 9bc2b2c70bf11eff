"""Trial: which ways of running a model give its own numbers; tried before they are trusted.

The truth is the model's plain forward on one text without padding. Sharing prompts, padding on the left and going on
from a cache are compared with it, on made-up texts of unequal lengths that go beyond the model's windows and the
lengths at which its positions change. What differs is not done: slower ways stand in for it. A model whose plain
forward on a text does not give what it gives on the beginning of the text is no policy, and is refused.

Shape legend: U unique prompts, P prompt positions, B rows, T response positions, X = T + 1, L positions, D
hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

SHORT = 14
"""Tokens of the longest text where nothing in the model depends on the length."""
STEPS = 3
"""Tokens that follow a prompt: enough to cross a border from two tokens below it."""


@dataclass(frozen=True)
class Ways:
    """How a model may be run."""

    shares: bool
    """Rows of a prompt go on from it by group-prefix attention."""
    pads: bool
    """Texts of unequal length stand side by side, padded on the left."""
    caches: bool
    """Texts go on from the cache of the model's own making."""
    reasons: tuple[str, ...]
    """What is not done and why, for the user."""


class Runner(Protocol):
    """What can be tried of a model (`textrl_gym.policy.backbone.Trunk` is one)."""

    model: Any

    @property
    def device(self) -> torch.device: ...
    def exact(self) -> AbstractContextManager[None]: ...
    def obstacle(self) -> str: ...
    def plain(self, ids_BL: Tensor) -> Tensor: ...
    def whole(self, prompt_BP: Tensor, mask_BP: Tensor, action_BT: Tensor, action_mask_BT: Tensor) -> Tensor: ...
    def shared(self, prompt_UP: Tensor, mask_UP: Tensor, source_B: Tensor, action_BT: Tensor) -> Tensor: ...
    def stepped(self, prompt_BP: Tensor, mask_BP: Tensor, action_BT: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Texts:
    """Made-up prompts of unequal length, the first of them with two rows."""

    prompt_UP: Tensor
    mask_UP: Tensor
    source_B: Tensor
    action_BT: Tensor
    crossing: list[int]
    """Rows whose beginnings are tried too: the longest one, and those whose actions cross a border."""

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """prompt_BP and mask_BP."""
        return self.prompt_UP[self.source_B], self.mask_UP[self.source_B]


def length(borders: Sequence[int], reach: int) -> int:
    """The length of text to try where texts reach a length: well beyond the borders that they cross."""
    crossed = [border for border in borders if border < reach]
    # A few tokens beyond a window hide a few of many: too little of a change to be told from rounding.
    return min(reach, max([SHORT, *(border + border // 4 + 12 for border in crossed)]))


def texts(longest: int, borders: Sequence[int], tokens: Sequence[int], device: torch.device) -> Texts:
    """Made-up texts, the longest of so many tokens; some prompts end just below a border."""
    steps = max(0, min(STEPS, longest - 1, longest // 2))
    most = longest - steps
    sizes = {most, min(most, 2)} | {max(1, b - 2) for b in borders if b - 2 < most}
    lengths = sorted(sizes, reverse=True)
    source = [0, *range(len(lengths))]
    generator = torch.Generator().manual_seed(0)
    choice = torch.tensor(tokens)
    prompt_UP = choice[torch.randint(len(tokens), (len(lengths), most), generator=generator)]
    action_BT = choice[torch.randint(len(tokens), (len(source), steps), generator=generator)]
    mask_UP = torch.arange(most) >= most - torch.tensor(lengths)[:, None]
    crossing = [0, *(row + 1 for row, size in enumerate(lengths) if size + 2 in borders)]
    source_B = torch.tensor(source, device=device)
    return Texts((prompt_UP * mask_UP).to(device), mask_UP.to(device), source_B, action_BT.to(device), crossing)


def plain_tokens(config: Any) -> list[int]:
    """Some token ids of a model that stand for text, and not for images or sounds."""
    fields = config.to_dict() | config.get_text_config(decoder=True).to_dict()
    others = ("image", "video", "audio", "vision", "boi", "eoi", "boa", "eoa", "speech")
    special = {v for name, v in fields.items() if isinstance(v, int) and any(word in name for word in others)}
    size = min(int(fields["vocab_size"]), 4096)
    return [token for token in range(size) if token not in special]


@torch.no_grad()
def examine(runner: Runner, longest: int, borders: Sequence[int]) -> Ways:
    """Compare the ways of running a model with its plain forward, on texts of at most so many tokens.

    Raises:
        ValueError: its plain forward cannot be run, or is no function of the text so far.
    """
    trial = texts(longest, borders, plain_tokens(runner.model.config), runner.device)
    prompt_BP, mask_BP = trial.rows
    with runner.exact():
        truth_BXD = _truth(runner, trial)
        like_truth = partial(closeness(truth_BXD), truth_BXD)
        inputs = (trial.prompt_UP, trial.mask_UP, trial.source_B, trial.action_BT)
        shares = runner.obstacle() or tried(like_truth, lambda: runner.shared(*inputs))
        action_mask_BT = torch.ones_like(trial.action_BT, dtype=torch.bool)
        pads = tried(like_truth, lambda: runner.whole(prompt_BP, mask_BP, trial.action_BT, action_mask_BT))
        caches = tried(like_truth, lambda: runner.stepped(prompt_BP, mask_BP, trial.action_BT))
    reasons = []
    if shares:
        reasons.append(
            f"cannot share a prompt among its completions ({shares}): prompts are computed for each completion, which "
            "is slower and gives the same results"
        )
    if pads:
        reasons.append(
            f"cannot be padded on the left ({pads}): texts of one length are computed together, without padding, which "
            "is slower"
        )
    elif caches:
        reasons.append(
            f"cannot go on from its cache ({caches}): each token is computed from the whole text, which is much slower"
        )
    return Ways(not shares, not pads, not pads and not caches, tuple(reasons))


def _truth(runner: Runner, made: Texts) -> Tensor:
    """The last hidden states of each row alone, below the logits of its actions and of one action more, [B, X, D]."""
    name, steps = type(runner.model).__name__, made.action_BT.shape[1]
    prompt_BP, mask_BP = made.rows
    rows = [
        torch.cat([prompt_P[mask_P], action_T])
        for prompt_P, mask_P, action_T in zip(prompt_BP, mask_BP, made.action_BT, strict=True)
    ]
    try:
        # The first two have one length, and need no padding together.
        twins_2XD = runner.plain(torch.stack(rows[:2]))[:, -steps - 1 :]
        truth_BXD = torch.cat([twins_2XD, *(runner.plain(ids_L[None])[:, -steps - 1 :] for ids_L in rows[2:])])
        # What comes after a token must not change what was said of it.
        before = [runner.plain(rows[b][None, : len(rows[b]) - steps])[0, -1] for b in made.crossing]
    except Exception as error:  # whatever a family of models raises
        raise ValueError(f"{name} cannot be run on text alone: {words(error)}") from error
    if not torch.isfinite(truth_BXD).all():
        raise ValueError(f"{name} gives NaN or infinity on plain text")
    close = closeness(truth_BXD)
    for b, hidden_D in zip(made.crossing, before, strict=True):
        if not close(truth_BXD[b, 0], hidden_D):
            raise ValueError(
                f"{name} is no policy on texts of {len(rows[b])} tokens: what it says of the first "
                f"{len(rows[b]) - steps} changes with what follows. Either it looks ahead (an encoder; set "
                "is_decoder=True in its configuration where it has that), or its positions are scaled by the length of "
                "the text (dynamic or longrope): keep max_prompt_tokens + max_new_tokens within the length that it was "
                "trained with"
            )
    return truth_BXD


def closeness(truth: Tensor) -> Callable[[Tensor, Tensor], bool]:
    """Whether two tensors are the same but for the order of their sums, by the scale of the truth."""
    # float32 keeps 7 digits and bfloat16 2 to 3; a fault of ours, or of theirs, changes the first ones.
    digits = 2e-4 if truth.dtype in (torch.float32, torch.float64) else 5e-2
    scale = float(truth.abs().max())
    # Written as "<=", so that a NaN is a difference.
    return lambda a, b: a.shape == b.shape and float((a - b).abs().max()) <= digits * scale


def tried(like_truth: Callable[[Tensor], bool], run: Callable[[], Tensor]) -> str:
    """Why a way of running a model is not taken; "" where it gives the truth."""
    try:
        found_BXD = run()
    except Exception as error:  # noqa: BLE001 - told as the reason for not going that way
        return words(error)
    return "" if like_truth(found_BXD) else "its numbers would change"


def words(error: Exception) -> str:
    """An error in a line; of what is not implemented its own words alone."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, NotImplementedError) else f"{type(error).__name__}: {lines[0]}".rstrip(": ")
