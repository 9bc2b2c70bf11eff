"""Positions: how many a model has a place for in a table, and the lengths at which what it does changes.

Learned positions and stored sines end with their table. Rotary ones have no end, but windows of attention and scaling
of the rotation begin to matter at a length that stands in the configuration.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

_TABLE = re.compile(r"(^|[._])(wpe|pos[a-z]*|[a-z]+_pos(itions?|itions_embed)?|positional[a-z_]*)([._]|$)")
_BORDER = re.compile(r"window|chunk|block|local|max_pos|max_seq|n_positions|n_ctx|original_max")
_NO_LENGTH = re.compile(r"expert|head|layer|num|global|size_per|factor|theta|type|rms|norm")


def limit(model: nn.Module) -> int | None:
    """The longest text that a model's table of positions has room for; None where it has no table."""
    config: Any = model.config
    made_for = stated(config)
    tables: list[int] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _TABLE.search(name):
            # Some families leave the first rows free: an offset, or those up to the padding's.
            padding = -1 if module.padding_idx is None else module.padding_idx
            tables.append(module.num_embeddings - max(getattr(module, "offset", 0), padding + 1))
    for name, buffer in model.named_buffers():
        if buffer.ndim == 2 and buffer.shape[0] > 1 and _TABLE.search(name):
            tables.append(buffer.shape[0])
    # Tables of another length are of something else, as of distances.
    sizes = [rows for rows in tables if made_for is None or abs(rows - made_for) <= 4]
    return min(sizes, default=None)


def stated(config: Any) -> int | None:
    """The longest text that a model was made for, as its configuration says; None where it says nothing."""
    fields = config.get_text_config(decoder=True).to_dict()
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length")
    return next((fields[name] for name in names if _is_length(fields.get(name))), None)


def borders(config: Any) -> list[int]:
    """The lengths of text beyond which a model may compute otherwise than below, ascending: windows, chunks, scaling.

    Too many cost time only: they are lengths that must be tried.
    """
    return sorted({value for name, value in _numbers(config.to_dict()) if _is_border(name) and _is_length(value)})


def _is_border(name: str) -> bool:
    return _BORDER.search(name) is not None and _NO_LENGTH.search(name) is None


def _is_length(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 1


def _numbers(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _numbers({str(key): inner for key, inner in value.items()})
        else:
            yield name, value


def check(model: nn.Module, longest: int | None, max_prompt_tokens: int, max_new_tokens: int) -> None:
    """Hold that a model has positions for the budgets of an environment; warn where it was made for shorter texts.

    Args:
        longest: what `limit` says of the model.

    Raises:
        ValueError: its table of positions ends before.
    """
    made_for, kind = stated(model.config), type(model).__name__
    # An encoder and a decoder count their positions apart; the decoder's start token has the place of the last action.
    apart = getattr(model.config, "is_encoder_decoder", False)
    reach = max(max_prompt_tokens, max_new_tokens) if apart else max_prompt_tokens + max_new_tokens
    budgets = f"prompts of at most {max_prompt_tokens} tokens and completions of at most {max_new_tokens}"
    if longest is not None and reach > longest:
        name = getattr(model, "name_or_path", "")
        where = f" {name!r}" if name else ""
        raise ValueError(
            f"the model{where} ({kind}) has {longest} positions, and {budgets} need {reach}: lower max_prompt_tokens "
            "or max_new_tokens of the environment, or take another model"
        )
    if made_for is not None and reach > made_for:
        warnings.warn(f"{kind} was made for texts of at most {made_for} tokens; {budgets} are more", stacklevel=3)
