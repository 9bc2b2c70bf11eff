"""number: 1 where a completion's final number is the reference's, else 0. "number:math" compares by math-verify.

The final number is the one behind the last "####" (as GSM8K writes it, Cobbe et al. 2021, arXiv:2110.14168), or in the
last \\boxed{...} (as MATH does), or the last number of the text. 1,234 is 1234, 3.0 is 3, $18 and 18% are 18.
"""

import importlib.util
import re
import threading
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from textrl_gym.rewards import missing_reference

SIGN = r"(?:(?<![\w.)])[-\u2212])?"
"""A minus; behind a digit, a letter or a bracket it is a subtraction or a hyphen."""
NUMBER = re.compile(rf"{SIGN}(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?(?:\s*/\s*\d+)?|{SIGN}\.\d+", re.ASCII)
"""Digits, with commas between thousands, a decimal part, or a fraction."""
MATH = "math"
LIMIT = 5
"""Seconds for one expression: a completion may write one that takes for ever, such as 9^9^9^9."""
MAX_DIGITS = 400
"""Longer numbers are none: no task has them, and exact arithmetic on a number of a million digits takes seconds."""


def make(argument: str | None) -> Callable[..., list[float]]:
    """The reward of a number; argument: "math" compares any mathematical expression, by the package math-verify.

    Raises:
        ValueError: another argument.
        ImportError: math-verify is asked for and not installed.
    """
    if argument not in (None, MATH):
        raise ValueError(f"reward 'number' takes no argument or 'math', given {argument!r}")
    if argument == MATH and importlib.util.find_spec("math_verify") is None:
        raise ImportError("reward 'number:math' needs the package math-verify: pip install math-verify")
    same = _same_expression if argument == MATH else _same_number

    def reward(
        prompts: list[str], completions: list[str], completion: list[str] | None = None, **columns: list[Any]
    ) -> list[float]:
        """1.0 or 0.0 for each row; the reference is the rows' column `completion`, or `answer` where that is missing.

        Raises:
            ValueError: a reference has no number.
        """
        references = columns.get("answer") if completion is None else completion
        if references is None:
            raise missing_reference("number", columns)
        return [float(same(str(reference), text)) for reference, text in zip(references, completions, strict=True)]

    return reward


def final_number(text: str) -> Fraction | None:
    """The number that a text ends with; None where there is none."""
    answer = _marked(text)
    numbers = NUMBER.findall(text if answer is None else answer)
    # Behind a mark the first number counts ("#### 18 dollars in 3 days"), without one the last.
    digits = (numbers[-1] if answer is None else numbers[0]) if numbers else ""
    if not digits or len(digits) > MAX_DIGITS:
        return None
    digits = digits.replace(",", "").replace("\u2212", "-").replace(" ", "")
    numerator, slash, denominator = digits.partition("/")
    if slash and int(denominator) == 0:
        return None
    return Fraction(numerator) / Fraction(denominator if slash else 1)


def _marked(text: str) -> str | None:
    """What stands behind the last "####" or in the last \\boxed{...}; None where there is neither."""
    if "####" in text:
        return text.rpartition("####")[2]
    _, mark, rest = text.rpartition("\\boxed{")
    if not mark:
        return None
    depth = 1
    for place, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return _without_frac(rest[:place])
    return _without_frac(rest)  # it was cut off


def _without_frac(latex: str) -> str:
    return re.sub(r"\\d?frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", latex)


def _same_number(reference: str, text: str) -> bool:
    answer = final_number(reference)
    if answer is None:
        raise ValueError(f"number: the reference text has no number: {reference[-60:]!r}")
    return final_number(text) == answer


def _same_expression(reference: str, text: str) -> bool:
    from math_verify import parse, verify

    # math-verify's time limits are signals, which only a program's main thread may set.
    seconds = LIMIT if threading.current_thread() is threading.main_thread() else None

    def expression(text: str) -> list[Any]:
        answer = _marked(text)
        return parse(text if answer is None else f"${answer}$", parsing_timeout=seconds)

    reference_expression = expression(reference)
    if not reference_expression:
        raise ValueError(f"number:math: the reference text has no expression: {reference[-60:]!r}")
    return bool(verify(reference_expression, expression(text), timeout_seconds=seconds))
