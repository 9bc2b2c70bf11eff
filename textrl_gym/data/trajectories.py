"""Trajectories: complete episodes as data, for offline RL and imitation.

A file has JSON lines. The first says what the episodes are of, the others are one episode each:

    {"trajectories": 1, "environment": "CopyText-v0", "tokens": "5f0c...", ...}
    {"prompt_ids": [1, 2], "token_ids": [1, 2, 0], "rewards": [0.0, 0.0, 1.0], "stop": "EOS", "score": 1.0, ...}

`tokens` is a hash of the vocabulary: ids mean nothing without the tokenizer that they were made by. Nothing is pickled.

Shape legend: B trajectories, P prompt positions, T response positions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from textrl_gym import files, functional
from textrl_gym.bounds import shown
from textrl_gym.core import Message, Rollout, StopReason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 1
HEAD = "trajectories"
"""The key of the first line that has the version."""


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """A complete episode: tokens, masks, turns and rewards.

    Raises:
        ValueError: naming the field that does not fit the others, or holds something else than it may.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    """All behind the prompt, in a conversation the environment's too."""
    rewards: list[float]
    """One for each token: of turns at their last tokens, and the score at the last of all. No KL penalty."""
    stop: StopReason
    score: float
    """Of the whole, as the reward gave it."""
    prompt: str = ""
    completion: str = ""
    """As the reward saw it."""
    replies: list[bool] = dataclasses.field(default_factory=list)
    """True on the environment's tokens; empty in a single turn, as are the next two."""
    turn: list[int] = dataclasses.field(default_factory=list)
    """The number of the agent's turn that each token belongs or replies to."""
    turns: list[Message] = dataclasses.field(default_factory=list)
    """What was said behind the prompt."""
    logp: list[float] = dataclasses.field(default_factory=list)
    """log pi(token) of who acted, 0 on the environment's tokens; empty where it is not known."""

    def __post_init__(self) -> None:
        for name in ("prompt_ids", "token_ids"):
            ids = getattr(self, name)
            if not ids or not all(type(i) is int and i >= 0 for i in ids):
                raise ValueError(f"{name} must be token ids, at least one, got {shown(ids)}")
        for name in ("rewards", "replies", "turn", "logp"):
            values, optional = getattr(self, name), name != "rewards"
            if len(values) != len(self.token_ids) and not (optional and not values):
                raise ValueError(f"{name} must have one value for each of {len(self.token_ids)} tokens, got {values}")
            if not all(isinstance(x, bool | int | float) and math.isfinite(x) for x in values):
                raise ValueError(f"{name} must hold finite numbers, got {shown(values)}")
        if not isinstance(self.score, int | float) or not math.isfinite(self.score):
            raise ValueError(f"score must be a finite number, got {shown(self.score)}")
        if self.replies and all(self.replies):
            raise ValueError("replies must leave the agent a token, got only tokens of the environment")

    @property
    def total(self) -> float:
        """The return: the sum of all rewards."""
        return math.fsum(self.rewards)

    @property
    def num_actions(self) -> int:
        """Tokens of the agent."""
        return len(self.token_ids) - sum(self.replies)


class TrajectoryFile(NamedTuple):
    """What a file holds."""

    facts: dict[str, Any]
    """Of its first line."""
    trajectories: list[Trajectory]


# -- files ------------------------------------------------------------------------------------------------------------


def write_trajectories(
    path: str | Path, trajectories: Sequence[Trajectory], tokenizer: PreTrainedTokenizerBase, **facts: Any
) -> None:
    """Write a file, whole or not at all.

    Args:
        tokenizer: by which the ids were made.
        facts: what else the first line should say, as JSON can hold it, such as environment="CopyText-v0".
    """
    head = {HEAD: VERSION, "tokens": vocabulary_hash(tokenizer)} | facts
    with files.atomic_writer(Path(path)) as file:
        file.write(json.dumps(head) + "\n")
        for trajectory in trajectories:
            row = {k: v for k, v in dataclasses.asdict(trajectory).items() if v != [] and v != ""}
            file.write(json.dumps(row | {"stop": trajectory.stop.name}) + "\n")


def read_trajectories(path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> TrajectoryFile:
    """Read a file.

    Args:
        tokenizer: hold that the ids are its own.

    Raises:
        ValueError: there is no such file, it holds no trajectories, another version, or ids of another tokenizer; or a
            line is wrong, which is named.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file of trajectories {str(path)!r}")
    lines = files.read_json_lines(path)
    head = lines[0] if lines else {}
    if not isinstance(head, dict) or head.get(HEAD) != VERSION:
        raise ValueError(f"{str(path)!r} holds no trajectories: its first line must have {HEAD!r}: {VERSION}")
    if len(lines) == 1:
        raise ValueError(f"{str(path)!r} holds no episode")
    if tokenizer is not None:
        check_vocabulary(head.get("tokens"), tokenizer, str(path))
    return TrajectoryFile(head, [_read(row, f"{path}, line {n}") for n, row in enumerate(lines[1:], start=2)])


def _read(row: object, where: str) -> Trajectory:
    names = {field.name for field in dataclasses.fields(Trajectory)}
    if not isinstance(row, dict) or not {"prompt_ids", "token_ids", "rewards", "stop", "score"} <= row.keys() <= names:
        raise ValueError(f"{where}: an episode has {', '.join(sorted(names))}, got {shown(row)}")
    if row["stop"] not in StopReason.__members__:
        raise ValueError(f"{where}: stop must be one of {', '.join(StopReason.__members__)}, got {row['stop']!r}")
    for name in ("prompt_ids", "token_ids", "rewards", "replies", "turn", "turns", "logp"):
        if not isinstance(row.get(name, []), list):
            raise ValueError(f"{where}: {name} must be a list, got {shown(row[name])}")
    try:
        return Trajectory(**row | {"stop": StopReason[row["stop"]]})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of a tokenizer's tokens and their ids."""
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]


def check_vocabulary(expected: object, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Raise ValueError where ids were made by a tokenizer with other tokens than this one's."""
    actual = vocabulary_hash(tokenizer)
    if expected != actual:
        raise ValueError(
            f"{where} has ids of a tokenizer with the hash {expected!r}, and the environment's tokenizer "
            f"{tokenizer.name_or_path!r} has {actual!r}: its ids mean other tokens"
        )


# -- rollouts ---------------------------------------------------------------------------------------------------------


def trajectories_of(rollout: Rollout) -> list[Trajectory]:
    """The episodes of a rollout, whose rewards must have no KL penalty in them."""
    columns: dict[str, list[list[Any]]] = {
        "token_ids": rollout.token_BT.tolist(),
        "rewards": rollout.reward_BT.tolist(),
        "logp": rollout.logp_BT.tolist(),
    }
    if rollout.reply_BT is not None and rollout.turn_BT is not None:
        columns |= {"replies": rollout.reply_BT.tolist(), "turn": rollout.turn_BT.tolist()}
    lengths, stops = rollout.present_BT.sum(1).tolist(), rollout.stop_B.tolist()
    prompts = [ids[mask].tolist() for ids, mask in zip(rollout.prompt_BP, rollout.prompt_mask_BP, strict=True)]
    return [
        Trajectory(
            prompt_ids=prompts[b],
            stop=StopReason(stops[b]),
            score=float(rollout.score_B[b]),
            prompt=rollout.prompts[b],
            completion=rollout.completions[b],
            turns=rollout.turns[b] if rollout.turns else [],
            **{name: column[b][:length] for name, column in columns.items()},
        )
        for b, length in enumerate(lengths)
    ]


def as_rollout(trajectories: Sequence[Trajectory], device: torch.device) -> Rollout:
    """Trajectories as a rollout: groups of one row, reference and KL 0, and log-probabilities 0 where unknown."""
    prompt_BP, prompt_mask_BP = functional.pad([one.prompt_ids for one in trajectories], "left")
    token_BT, present_BT = functional.pad([one.token_ids for one in trajectories], "right")
    reply_BT = _padded([one.replies for one in trajectories], present_BT).bool()
    reward_BT = _padded([one.rewards for one in trajectories], present_BT)
    score_B = torch.tensor([float(one.score) for one in trajectories])
    logp_BT, zero_BT = _padded([one.logp for one in trajectories], present_BT), torch.zeros(present_BT.shape)
    spoken = any(one.turn for one in trajectories)
    of_turns: dict[str, Any] = {}
    if spoken:
        last_B1 = functional.last_places(present_BT & ~reply_BT)[:, None]
        of_turns = {
            "reply_BT": reply_BT,
            "turn_BT": _padded([one.turn for one in trajectories], present_BT).long(),
            "turn_reward_BT": reward_BT.scatter_add(1, last_B1, -score_B[:, None]),
        }
    tensors = {
        "prompt_BP": prompt_BP,
        "prompt_mask_BP": prompt_mask_BP,
        "token_BT": token_BT,
        "mask_BT": present_BT & ~reply_BT,
        "logp_BT": logp_BT,
        "ref_logp_BT": zero_BT,
        "kl_BT": zero_BT,
        "value_BT": zero_BT,
        "score_B": score_B,
        "reward_BT": reward_BT,
        "stop_B": torch.tensor([one.stop.value for one in trajectories]),
        "group_B": torch.arange(len(trajectories)),
    }
    return Rollout(
        **cast("dict[str, Any]", {name: tensor.to(device) for name, tensor in (tensors | of_turns).items()}),
        prompts=[one.prompt for one in trajectories],
        completions=[one.completion for one in trajectories],
        turns=[one.turns for one in trajectories] if spoken else [],
    )


def _padded(rows: Sequence[Sequence[float]], present_BT: Tensor) -> Tensor:
    """Numbers of tokens as float32 [B, T]; 0 outside, and in rows that have none."""
    padded_BT = torch.zeros(present_BT.shape)
    for b, row in enumerate(rows):
        padded_BT[b, : len(row)] = torch.tensor(row, dtype=torch.float32)
    return padded_BT
