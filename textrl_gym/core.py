"""The words of the project: stop reasons, prompts, rewards and the one record that flows between them.

Shape legend, used as the suffix of tensor names everywhere:
    B rows (episodes)      P prompt places       V vocabulary
    T response places      L = P + T places      U unique prompts
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:  # what only lists, or says what is wrong, does without torch
    import torch
    from torch import Tensor


class StopReason(enum.IntEnum):
    """Why an episode ended: Gymnasium's truncated for LENGTH and MAX_TURNS, and terminated for the others.

    In a conversation EOS and stop strings end a turn of the agent: the episode goes on, or ends by one of the others.
    """

    RUNNING = 0
    EOS = 1
    STOP_STRING = 2
    LENGTH = 3
    MAX_TURNS = 4
    """The agent has had all the turns that a task allows."""
    DONE = 5
    """The environment ended the conversation, by Reply(done=True)."""


Row = Mapping[str, Any]
"""One prompt: {"prompt": str, "completion": str (the reference text, where there is one), **columns}."""


PROMPTS_KEEP_EOS = "prompts_keep_eos"
"""A keyword of tokenizers, saved with them: prompts keep the EOS that is put behind every text, for an encoder."""


@runtime_checkable
class PromptSource(Protocol):
    """A sequence of rows with random access. Which row an episode gets is drawn by the environment."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Row: ...


Message = dict[str, str]
"""One turn of a conversation as transformers writes it: {"role": "assistant" (the agent) or "user", "content": str}."""


class Reply(NamedTuple):
    """What an environment answers to a turn of the agent (`Task.reply`)."""

    text: str
    reward: float = 0.0
    """Of the agent's turn."""
    done: bool = False
    """Whether the conversation is over. The text is then in the turns, but no token of it in the observation."""


RewardSpec = str | Callable[..., Any] | Mapping[str, float]
"""A name, "name:argument", "package.module:name", a folder, a callable, or a weighted mapping of those strings.

A callable has TRL's signature: f(prompts, completions, **columns) -> B finite numbers. Every column of the task's rows
arrives as a list of B items, with `prompt_ids` and `completion_ids` (lists of B lists of token ids, without padding; a
final EOS is included).
"""


class Scores(NamedTuple):
    """What the reward says of N finished completions."""

    score_N: Tensor
    """float32."""
    texts: list[str]
    """As the reward saw them."""
    components: dict[str, Tensor]
    """Of a reward that is a mixture: name of each part -> float32 [N], its unweighted scores; else empty. NaN where the
    part gave None."""
    logged: dict[str, list[Any]]
    """What the reward said of each completion by log_extra: name -> N items."""


@dataclasses.dataclass
class Rollout:
    """B complete episodes: what collect() returns, and all that an agent's update needs.

    Masks are made from lengths and never from token identity (pad may equal EOS). EOS is inside the mask, once. In a
    conversation there are two: attention sees the agent's tokens and the environment's (present_BT), and all that is
    learnt or counted is about the agent's alone (mask_BT).
    Places outside a mask hold 0 in every tensor, so that nothing there can become NaN or leak.
    """

    prompt_BP: Tensor
    """int64, left-padded with 0s under prompt_mask_BP."""
    prompt_mask_BP: Tensor
    """bool."""
    token_BT: Tensor
    """int64, the actions, and in a conversation the environment's replies between them, right-padded with 0s."""
    mask_BT: Tensor
    """bool, True on the actions that were taken (the final EOS included)."""
    logp_BT: Tensor
    """float32, log pi(token | prompt, prefix) of the sampling policy, at its temperature."""
    ref_logp_BT: Tensor
    """float32, the same under the frozen reference; equal to logp_BT where there is no reference."""
    kl_BT: Tensor
    """float32, the per-token KL estimate that the reward was shaped with (the environment's estimator)."""
    value_BT: Tensor
    """float32, the critic's V(s_t) before action t; 0 without a critic."""
    score_B: Tensor
    """float32, the raw terminal score of the reward."""
    reward_BT: Tensor
    """float32, [t is last] * score - missing-EOS penalty - kl_coef * kl_BT, and at each turn's last action the turn's
    reward: what stepping would have returned."""
    stop_B: Tensor
    """int64, StopReason."""
    group_B: Tensor
    """int64, rows of one group answer the same prompt."""
    prompts: list[str] = dataclasses.field(default_factory=list)
    """B texts, as the reward saw them."""
    completions: list[str] = dataclasses.field(default_factory=list)
    """B texts, as the reward saw them."""
    model_calls_B: Tensor | None = None
    """float32, states that a model was asked about for the completion, as agents that search count them; None: one for
    each token."""
    components: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """Of a reward that is a mixture: name of each part -> float32 [B], its unweighted scores; else empty. NaN where the
    part gave None."""
    logged: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    """What the reward said of each completion by log_extra: name -> B items."""
    reply_BT: Tensor | None = None
    """bool, True on the environment's tokens; None where the task has a single turn, as in the fields below."""
    turn_BT: Tensor | None = None
    """int64, the number of the agent's turn, from 0, that an action belongs to, or that a token of the environment
    replies to."""
    turn_reward_BT: Tensor | None = None
    """float32, the reward of each turn at its last action; reward_BT has it too."""
    turns: list[list[Message]] = dataclasses.field(default_factory=list)
    """B conversations behind their prompts; empty where the task has a single turn."""
    sampler_logp_BT: Tensor | None = None
    """float32, log pi(token | prompt, prefix) as a rollout server has computed it, whose kernels and weights may not be
    quite the policy's, while logp_BT is the training forward's; None where the policy itself has sampled."""
    extra: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """What an update adds by `with_`: advantages, returns; the names end in _B or _BT."""

    def __len__(self) -> int:
        return self.token_BT.shape[0]

    @property
    def num_tokens(self) -> int:
        """Actions in the rollout: its timesteps."""
        return int(self.mask_BT.sum())

    @property
    def outcome_B(self) -> Tensor:
        """float32, the score and the rewards of all turns, without penalties."""
        return self.score_B if self.turn_reward_BT is None else self.score_B + self.turn_reward_BT.sum(1)

    @property
    def present_BT(self) -> Tensor:
        """bool, True on all tokens behind the prompt, the agent's and the environment's: what attention sees."""
        return self.mask_BT if self.reply_BT is None else self.mask_BT | self.reply_BT

    def with_(self, **tensors: Tensor) -> Rollout:
        """The rollout with more tensors in `extra`, which go through select, trim and micro-batches with the others.

        Raises:
            ValueError: a name that ends in neither _B nor _BT or is taken, or a tensor of another shape.
        """
        shapes = {"BT": self.mask_BT.shape, "B": self.mask_BT.shape[:1]}
        for name, tensor in tensors.items():
            shape = shapes.get(name.rpartition("_")[2])
            if shape is None or hasattr(Rollout, name) or name in {field.name for field in dataclasses.fields(Rollout)}:
                raise ValueError(f"a tensor of a rollout has a free name that ends in _B or _BT, got {name!r}")
            if tensor.shape != shape:
                raise ValueError(f"{name} must have the shape {tuple(shape)}, got {tuple(tensor.shape)}")
        return dataclasses.replace(self, extra=self.extra | tensors)

    def select(self, rows_B: Tensor) -> Rollout:
        """The given rows (int64 or bool [B]), with columns that no chosen row uses cut off."""
        import torch

        # As numbers, because lists of texts can be picked by numbers only.
        rows_B = rows_B.nonzero().squeeze(1) if rows_B.dtype == torch.bool else rows_B
        picked: dict[str, Any] = {}
        for field in dataclasses.fields(Rollout):
            value = getattr(self, field.name)
            if isinstance(value, dict):
                value = {name: _rows(part_B, rows_B) for name, part_B in value.items()}
            elif value is not None:
                value = _rows(value, rows_B)
            picked[field.name] = value
        return Rollout(**picked).trim()

    @staticmethod
    def cat(rollouts: Sequence[Rollout]) -> Rollout:
        """Rollouts below each other, groups numbered anew."""
        import torch

        prompt, response = (max(getattr(r, name).shape[1] for r in rollouts) for name in ("prompt_BP", "token_BT"))
        groups, joined = 0, dict[str, Any]()
        numbers_B = []
        for rollout in rollouts:
            # Each part's groups get numbers of their own: two prompts of one number would share a baseline.
            numbers_B.append(rollout.group_B.unique(return_inverse=True)[1] + groups)
            groups = int(numbers_B[-1].max()) + 1
        for field in dataclasses.fields(Rollout):
            parts = [getattr(r, field.name) for r in rollouts]
            if field.name.endswith("_BP"):
                # Prompts end where completions begin, so that padding goes to their left.
                parts = [torch.nn.functional.pad(part, (prompt - part.shape[1], 0)) for part in parts]
            elif field.name.endswith("_BT"):
                whole = [part for part in parts if part is not None]
                assert len(whole) in (0, len(parts)), f"rollouts with and without {field.name}"
                joined[field.name] = None
                parts = [_widened(field.name, part, response) for part in whole]
                if not parts:
                    continue
            # One part that does not count calls makes the sum unknown.
            if field.name == "model_calls_B":
                joined[field.name] = None if any(part is None for part in parts) else torch.cat(parts)
                continue
            if field.name == "logged":
                names = dict.fromkeys(name for part in parts for name in part)
                # A reward may say of some completions what it does not say of others.
                filled = [{name: [None] * len(r) for name in names} | r.logged for r in rollouts]
                joined[field.name] = {name: [item for part in filled for item in part[name]] for name in names}
                continue
            if field.name in ("components", "extra"):
                names = parts[0].keys()
                assert all(part.keys() == names for part in parts), f"rollouts of different {field.name}"
                joined[field.name] = {
                    name: torch.cat([_widened(name, part[name], response) for part in parts]) for name in names
                }
                continue
            is_tensor = isinstance(parts[0], torch.Tensor)
            joined[field.name] = torch.cat(parts) if is_tensor else [text for part in parts for text in part]
        return Rollout(**(joined | {"group_B": torch.cat(numbers_B)}))

    def to(self, device: torch.device) -> Rollout:
        """The rollout with its tensors on a device."""
        import torch

        moved: dict[str, Any] = {}
        for field in dataclasses.fields(Rollout):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                value = value.to(device)
            elif isinstance(value, dict):  # not of `logged`, whose values are the reward's own
                value = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in value.items()}
            moved[field.name] = value
        return Rollout(**moved)

    def trim(self) -> Rollout:
        """Without the columns that are padding in every row."""
        # One .item() for each of both: a wait for the GPU, worth it for the columns that no pass computes then.
        first_place = self.prompt_mask_BP.shape[1] - int(self.prompt_mask_BP.sum(1).max())
        longest = int(self.present_BT.sum(1).max())
        cut: dict[str, Any] = {}
        for field in dataclasses.fields(Rollout):
            value = getattr(self, field.name)
            if field.name == "extra":
                value = {name: x[:, :longest] if name.endswith("_BT") else x for name, x in value.items()}
            elif field.name.endswith("_BP"):
                value = value[:, first_place:]
            elif field.name.endswith("_BT") and value is not None:
                value = value[:, :longest]
            cut[field.name] = value
        return Rollout(**cut)


def _rows(value: Tensor | list[Any], rows_B: Tensor) -> Tensor | list[Any]:
    """Some rows of a tensor or a list; a list that holds nothing for any row stays so."""
    if not isinstance(value, list):
        return value[rows_B]
    return [value[i] for i in rows_B.tolist()] if value else []


def _widened(name: str, tensor: Tensor, places: int) -> Tensor:
    """A tensor of a rollout with more response places of padding, where its name says that it has any."""
    import torch

    return torch.nn.functional.pad(tensor, (0, places - tensor.shape[1])) if name.endswith("_BT") else tensor
