"""Checkable instructions: IFEval's ids by rule, and what they are with the package if-verifiable."""

from typing import Any

import pytest

from textrl_gym.rewards import load_reward
from textrl_gym.rewards.instructions import CHECKS, check

SETTINGS: dict[str, dict[str, Any]] = {
    "keywords:existence": {"keywords": ["sun", "rain"]},
    "keywords:frequency": {"keyword": "sun", "frequency": 2, "relation": "at least"},
    "keywords:forbidden_words": {"forbidden_words": ["snow"]},
    "keywords:letter_frequency": {"letter": "e", "let_frequency": 3, "let_relation": "less than"},
    "length_constraints:number_words": {"num_words": 4, "relation": "at least"},
    "length_constraints:number_sentences": {"num_sentences": 2, "relation": "at least"},
    "length_constraints:number_paragraphs": {"num_paragraphs": 2},
    "detectable_content:number_placeholders": {"num_placeholders": 1},
    "detectable_format:number_bullet_lists": {"num_bullets": 2},
    "detectable_format:number_highlighted_sections": {"num_highlights": 1},
    "detectable_format:json_format": {},
    "detectable_format:title": {},
    "startend:end_checker": {"end_phrase": "Bye now."},
    "startend:quotation": {},
    "change_case:english_capital": {},
    "change_case:english_lowercase": {},
    "punctuation:no_comma": {},
}
KEEPS = {
    "keywords:existence": "Sun and rain.",
    "keywords:frequency": "The sun, the Sun.",
    "keywords:forbidden_words": "It was snowing.",  # another word
    "keywords:letter_frequency": "Eve ran.",
    "length_constraints:number_words": "One, two - three! four",
    "length_constraints:number_sentences": "It rains. Why?",
    "length_constraints:number_paragraphs": "First.\n***\nSecond.",
    "detectable_content:number_placeholders": "Dear [name], hello.",
    "detectable_format:number_bullet_lists": "Two:\n* a\n- b",
    "detectable_format:number_highlighted_sections": "This is *new* here.",
    "detectable_format:json_format": '```json\n{"a": [1]}\n```',
    "detectable_format:title": "<<rain>>\nIt rains.",
    "startend:end_checker": "We go. Bye now.",
    "startend:quotation": ' "We go." ',
    "change_case:english_capital": "WE GO TO TOWN.",
    "change_case:english_lowercase": "we go to town.",
    "punctuation:no_comma": "We go; you stay.",
}
BREAKS = {
    "keywords:existence": "Sun and wind.",
    "keywords:frequency": "The sun.",
    "keywords:forbidden_words": "Snow fell.",
    "keywords:letter_frequency": "Eve went free.",
    "length_constraints:number_words": "One, two, three.",
    "length_constraints:number_sentences": "It rains, e.g.today.",
    "length_constraints:number_paragraphs": "First.\n***\n***\nSecond.",
    "detectable_content:number_placeholders": "Dear Ann, hello.",
    "detectable_format:number_bullet_lists": "One:\n* a\n**b**",
    "detectable_format:number_highlighted_sections": "This is ** here.",
    "detectable_format:json_format": "{a: 1}",
    "detectable_format:title": "<< >>\nIt rains.",
    "startend:end_checker": "Bye now. We go.",
    "startend:quotation": '"',
    "change_case:english_capital": "We go to town.",
    "change_case:english_lowercase": "We go to town.",
    "punctuation:no_comma": "We go, you stay.",
}


def scores(name: str, completions: list[str], **columns: Any) -> list[float]:
    return load_reward(name)(["p"] * len(completions), completions, **columns).tolist()


@pytest.mark.parametrize("name", CHECKS)
def test_an_instruction_is_kept_or_not(name: str) -> None:
    for text, kept in ((KEEPS[name], True), (BREAKS[name], False), ("", False), (" \n", False)):
        # As the Hub gives them: every setting of any instruction is there, and None where it is another's.
        given = dict.fromkeys([key for some in SETTINGS.values() for key in some]) | SETTINGS[name]
        assert check(text, [name], [given]) == [kept], text


@pytest.mark.parametrize("name", [name for name in CHECKS if name != "length_constraints:number_sentences"])
def test_the_package_if_verifiable_says_the_same(name: str) -> None:
    """Of all but sentences, for which it has to download a model."""
    registry = pytest.importorskip("if_verifiable.ifeval.instructions_registry")
    checker = registry.INSTRUCTION_DICT[name](name)
    checker.build_description(**SETTINGS[name])
    for text in (*KEEPS.values(), *BREAKS.values()):
        if name == "change_case:english_capital" and text.isupper():
            continue  # it also guesses the language, of texts too short for that
        if name == "change_case:english_lowercase" and text.islower():
            continue
        assert check(text, [name], [SETTINGS[name]]) == [bool(checker.check_following(text))], text


def test_the_reward_is_a_share_or_all() -> None:
    ids = ["punctuation:no_comma", "detectable_format:title"]
    columns: dict[str, Any] = {"instruction_id_list": [ids] * 3, "kwargs": [[{}, {}]] * 3}
    texts = ["<<a>> b", "b", "b, c"]
    assert scores("instructions", texts, **columns) == [1.0, 0.5, 0.0]
    assert scores("instructions:all", texts, **columns) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"kwargs": [[{}]]}, "needs the columns instruction_id_list, kwargs"),
        (
            {"instruction_id_list": [["combination:repeat_prompt"]], "kwargs": [[{}]]},
            "'combination:repeat_prompt'; known",
        ),
        ({"instruction_id_list": [[]], "kwargs": [[]]}, "at least one instruction"),
        ({"instruction_id_list": [["punctuation:no_comma"]], "kwargs": [[]]}, "got 1 instruction_id_list and 0 kwargs"),
        ({"instruction_id_list": [["startend:end_checker"]], "kwargs": [[{}]]}, "'startend:end_checker' cannot have"),
        (
            {
                "instruction_id_list": [["length_constraints:number_words"]],
                "kwargs": [[{"num_words": 3, "relation": "about"}]],
            },
            "relation must be one of 'less than', 'at least', got 'about'",
        ),
    ],
)
@pytest.mark.parametrize("text", ["a", ""])
def test_bad_rows_are_refused_in_words(columns: dict[str, Any], words: str, text: str) -> None:
    with pytest.raises(Exception, match=words):
        scores("instructions", [text], **columns)


def test_an_unknown_argument() -> None:
    with pytest.raises(ValueError, match="takes no argument or 'all', given 'some'"):
        load_reward("instructions:some")
