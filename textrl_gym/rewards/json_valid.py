"""json_valid: 1 where a completion is JSON, in a ```json block or bare; else 0."""

import json
import re
from typing import Any

BLOCK = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n\s*```\s*", re.DOTALL)
"""Markdown's fence around the whole completion."""


def reward(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
    """1.0 or 0.0 for each row. NaN and Infinity are no JSON (RFC 8259), though Python reads them."""
    return [float(_is_json(completion)) for completion in completions]


def _is_json(text: str) -> bool:
    block = BLOCK.fullmatch(text)
    try:
        json.loads(block[1] if block else text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(constant: str) -> None:
    raise ValueError(constant)
