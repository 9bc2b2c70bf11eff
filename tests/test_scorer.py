"""Stop strings on a bounded tail: the same answers as decoding the whole completion, for each kind of tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from textrl_gym.mdp.scorer import Scorer, decodes_locally
from textrl_gym.models import tiny
from textrl_gym.models.tokenizer import train_tokenizer
from textrl_gym.rewards import load_reward

CPU = torch.device("cpu")


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """As Llama's: "\u2581" for a space, bytes for what has no token, and the first space of a text is stripped."""
    pieces = ["<eos>", "<s>", *(f"<0x{byte:02X}>" for byte in (0x0A, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xFF))]
    pieces += ["\u2581", "\u2581a", "a", "b", "\u2581b", "b\u2581c", "c", ".", "\u2581\u2581", "d\u2581"]
    inner = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<eos>"))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", bos_token="<s>")


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT's: "##" joins a piece to the word before it."""
    vocab = {piece: i for i, piece in enumerate(["<eos>", "a", "##a", "b", "##b", ".", "c", "##c d"])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<eos>"))
    inner.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


KINDS: dict[str, Any] = {
    "byte-level BPE": train_tokenizer(["the cat.\n\nThe caf\u00e9 \u20ac", "a \U0001f600  b"] * 3, vocab_size=300),
    "sentencepiece-like": sentencepiece_like(),
    "word piece": word_piece(),
    "symbols": tiny.symbol_tokenizer(["a", "b", "c", ".", "ab"]),
    "in Python": ByT5Tokenizer(),
}
STOPS = [
    "\n\n",
    "\n",
    "b c",
    "a",
    " a",
    "a ",
    "\u00e9",
    "\u20ac",
    "\u00e9\u20ac",
    "\U0001f600",
    ".",
    "##a",
    "a b",
    " ",
    "\ufffd",
    "\ufffda",
]


def scorer_of(kind: str, stop: Sequence[str]) -> Scorer:
    return Scorer(KINDS[kind], stop, load_reward("length"), CPU)


def first_stop(texts: Sequence[str], stop: Sequence[str]) -> int | None:
    """After how many tokens a stop string stands in the text, by decoding all of it at each token."""
    return next((n for n, text in enumerate(texts, 1) if any(s in text for s in stop)), None)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_bounded_tail_finds_what_the_whole_text_has(kind: str, data: st.DataObject) -> None:
    tokenizer = KINDS[kind]
    # Few different tokens, so that stop strings of several tokens occur; the bytes of characters among them.
    text = data.draw(st.text(st.sampled_from("ab c.\n\u00e9\u20ac\U0001f600"), max_size=24))
    pool = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=12))
    pool += tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = data.draw(st.lists(st.sampled_from(pool), min_size=1, max_size=40))
    ids = data.draw(st.sampled_from([ids, ids + tokenizer(text, add_special_tokens=False)["input_ids"]]))
    stop = data.draw(st.lists(st.sampled_from(STOPS), min_size=1, max_size=2))
    scorer = scorer_of(kind, stop)
    texts = [scorer.decode(ids[:n]) for n in range(1, len(ids) + 1)]
    end = first_stop(texts, stop)
    lived = ids[:end]  # the episode is over there
    assert scorer.completes_stop([lived[:n] for n in range(1, len(lived) + 1)]) == [
        n == end for n in range(1, len(lived) + 1)
    ]


@pytest.mark.parametrize("kind", ["byte-level BPE", "sentencepiece-like"])
def test_the_tail_does_not_grow_with_the_text(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, most = scorer_of(kind, ["\u20ac\u20ac"]), 0
    token = KINDS[kind].convert_tokens_to_ids("a")
    decode = scorer.decode

    def counting(ids: Sequence[int]) -> str:
        nonlocal most
        most = max(most, len(ids))
        return decode(ids)

    monkeypatch.setattr(scorer, "decode", counting)
    assert not any(scorer.completes_stop([[token] * n for n in range(1, 200)]))
    assert most == 6 + 4  # the stop string's bytes, and the slack


def test_a_character_cut_by_the_tail() -> None:
    """A run of bytes longer than the tail: its end alone is no UTF-8, so the tail is drawn to the run's beginning."""
    tokenizer, scorer = KINDS["sentencepiece-like"], scorer_of("sentencepiece-like", ["\u20ac\u00e9"])
    euro, accent = (
        tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in text.encode()]) for text in ("\u20ac", "\u00e9")
    )
    ids = euro * 20 + accent
    assert scorer.completes_stop([ids]) == [True]
    # after a byte that is no UTF-8, the whole run has no characters: its end alone would have them
    stray = tokenizer.convert_tokens_to_ids(["<0xFF>"])
    assert scorer.decode(stray + ids) == "\ufffd" * 63
    assert scorer.completes_stop([stray + ids]) == [False]


def test_where_the_whole_text_is_decoded() -> None:
    assert [kind for kind in KINDS if not decodes_locally(KINDS[kind])] == ["in Python"]
    inner = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    inner.decoder = decoders.CTC()  # drops repeated tokens, so that a token's text depends on those before it
    assert not decodes_locally(PreTrainedTokenizerFast(tokenizer_object=inner))


def test_the_text_ends_before_the_first_stop_string() -> None:
    scorer = scorer_of("symbols", ["b c", "."])
    ids = KINDS["symbols"]("a . b c")["input_ids"]
    assert scorer.text([*ids, KINDS["symbols"].eos_token_id]) == "a "
    assert scorer_of("symbols", []).text(ids) == "a . b c"


def test_a_given_text_may_contain_a_stop_string_anywhere() -> None:
    # as pairs of a file do; completes_stop is asked while tokens are appended
    ids = KINDS["symbols"]("a . b c a")["input_ids"]
    assert scorer_of("symbols", ["."]).stopped([ids, ids[:1]]) == [True, False]
