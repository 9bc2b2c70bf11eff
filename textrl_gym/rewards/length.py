"""length: how long a completion is, in tokens. For mixtures, as {"rouge": 1.0, "length": -0.01}."""

from typing import Any


def reward(
    prompts: list[str],
    completions: list[str],
    completion_ids: list[list[int]] | None = None,
    action_mask: list[list[bool]] | None = None,
    **columns: list[Any],
) -> list[float]:
    """Generated tokens, a final EOS included; words where there are no `completion_ids` (texts from elsewhere).

    Of a conversation the agent's tokens, which `action_mask` tells.
    """
    if action_mask is not None:
        return [float(sum(mask)) for mask in action_mask]
    if completion_ids is not None:
        return [float(len(ids)) for ids in completion_ids]
    return [float(len(completion.split())) for completion in completions]
