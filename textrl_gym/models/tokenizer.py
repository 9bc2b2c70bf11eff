"""A small byte-level BPE tokenizer, trained on any texts, and the size of any tokenizer's vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EOS = "<|endoftext|>"
PAD = "<|pad|>"


def vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The size of a vocabulary: the highest id and one.

    Not len(tokenizer), which counts tokens: where ids are left out, tokens stand above their number, EOS too perhaps.
    """
    # The decoder of added tokens too: in tokenizers written in Python get_vocab() may leave them out.
    return 1 + max(*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder, *tokenizer.all_special_ids)


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the texts: no unknowns, every text comes back as it was. Deterministic in the texts.

    GPT-2's pre-tokeniser keeps a leading space with its word and splits digits from letters, so that most names,
    amounts and dates of a small world are one to three tokens: short enough for a small model to copy.

    Args:
        texts: what to learn the merges from; any other text is encoded too, byte by byte where need be.
        vocab_size: at most this many tokens: 256 bytes, EOS, a pad token of its own, and merges.

    Raises:
        ValueError: vocab_size leaves no room for the 256 bytes and the two special tokens.
    """
    if vocab_size < 258:
        raise ValueError(f"vocab_size={vocab_size} is too small: 256 bytes and 2 special tokens need at least 258")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    # PAD differs from EOS because transformers' classifiers find the last token of a text by "not pad", and a
    # reward model must read its value at the EOS. Our own masks come from lengths and do not care.
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
