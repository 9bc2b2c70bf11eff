"""Text to tokens and back: a text becomes text, and only chat templates and ends make special tokens.

Prompts, completions of data, reference texts, judged texts and what rewards see all come through here. Three rules:

1. The letters of a special token in a text ("<|im_end|>" in a post) are encoded as letters. As the token they would let
   whoever writes a post end the turn and begin another: a prompt injection.
2. A completion is encoded behind its prompt and never apart from it: a tokenizer of Llama 2's kind puts a space before
   every text, so that " I lost", encoded alone, would be learnt as "  I lost".
3. A finished completion ends in one end token, also where its text is already written with one.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, cast

from textrl_gym.core import PROMPTS_KEEP_EOS
from textrl_gym.data.rows import BadRow

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
Unknown = Literal["raise", "skip"]
"""What becomes of a word that the tokenizer has neither a token nor an unknown token for: an error, or nothing."""

NO_TOKEN = -1
"""In place of the id of a word that a tokenizer refuses."""
MISSING_UNKNOWN = "Missing [UNK] token"
"""What the tokenizers library says then; it has no class of error for it."""
SPACE_MARK = "\u2581"
"""How tokenizers of sentencepiece's kind write a space."""
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""A byte of a text that has no other token. Some tokenizers list them as special, though they are text."""
MARK_BEGIN, MARK_END = "\U000f0000", "\U000f0001"
"""Private characters around the letters of special tokens while a chat template writes them."""


class Chat(list[dict[str, str]]):
    """A conversation that the tokenizer's chat template writes: {"role", "content"} for each turn.

    A class of its own, so that a list in a column of a data set is never taken for one.

    Args:
        tools: what the template is told that the assistant may call; None: those of `turns`, where that is a Chat.
    """

    def __init__(self, turns: Iterable[dict[str, str]] = (), tools: list[Any] | None = None) -> None:
        super().__init__(turns)
        self.tools: list[Any] | None = getattr(turns, "tools", None) if tools is None else tools


def prompt_of(row: Mapping[str, Any]) -> str | Chat:
    """What a row's completions stand behind: its conversation where a chat template writes it, else its text."""
    chat = row.get("chat")
    return chat if isinstance(chat, Chat) else row["prompt"]


REFUSED = "the model's chat template refused the conversation"


def write_chat(chat: Chat, tokenizer: PreTrainedTokenizerBase, *, answered: bool = False) -> str:
    """A conversation as the tokenizer's chat template writes it.

    Args:
        answered: the last turn is the answer; else the template begins one.

    Raises:
        BadRow: the template refuses it, or fails.
    """
    try:
        # A text and no list of ids: tokenize=False, of one conversation.
        how: dict[str, Any] = {"tools": chat.tools, "tokenize": False, "add_generation_prompt": not answered}
        text = tokenizer.apply_chat_template(list(chat), **how)
    except Exception as error:  # whatever a template raises, by raise_exception() or by a fault of its own
        raise BadRow(REFUSED, str(error) or type(error).__name__) from error
    return cast("str", text)


class Encoded(NamedTuple):
    """A text as tokens."""

    ids: list[int]
    added: list[bool]
    """True for the tokens that the tokenizer puts around every text, such as a BOS."""
    begins: list[int]
    """The place in the text of each token's first character; empty for tokenizers written in Python."""

    def part(self, start: int, end: int | None = None) -> Encoded:
        """Some of the tokens."""
        return Encoded(self.ids[start:end], self.added[start:end], self.begins[start:end])

    def open(self) -> Encoded:
        """Without what was put behind the text, so that another text may follow."""
        text = [n for n, added in enumerate(self.added) if not added]
        return self.part(0, text[-1] + 1) if text else self


def keeps_end(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether prompts keep the EOS that the tokenizer puts behind every text.

    An encoder was trained on texts that end in it; a decoder alone would read that the completion is over. Where a
    tokenizer is loaded from an encoder-decoder's folder the keyword is set.
    """
    return bool(tokenizer.init_kwargs.get(PROMPTS_KEEP_EOS, False))


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids of special tokens, which stand for no text."""
    ids = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    names = {index: str(tokenizer.convert_ids_to_tokens(index)) for index in ids | set(tokenizer.all_special_ids)}
    return frozenset(index for index, name in names.items() if BYTE_TOKEN.fullmatch(name) is None)


def control_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that may end a text: special tokens, and those that were added to the vocabulary of text."""
    tokens = tokenizer.added_tokens_decoder.items()
    added = {index for index, token in tokens if BYTE_TOKEN.fullmatch(token.content) is None}
    return special_ids(tokenizer) | added


def end_ids(tokenizer: PreTrainedTokenizerBase, declared: Iterable[int]) -> tuple[int, ...]:
    """The ids that end a completion: the tokenizer's EOS, and of those that its model declares all that may.

    The config of a model that was made in code may declare any number, such as the 2 of Llama's default.
    """
    control = control_ids(tokenizer)
    return tuple(dict.fromkeys([int(tokenizer.eos_token_id), *(i for i in declared if i in control)]))


def check_end_ids(tokenizer: PreTrainedTokenizerBase, chosen: int | Sequence[int]) -> tuple[int, ...]:
    """The ids that a user chose to end a completion.

    Raises:
        ValueError: none, or one that is neither a special nor an added token.
    """
    ids: tuple[Any, ...] = tuple(chosen) if isinstance(chosen, Iterable) else (chosen,)
    control = control_ids(tokenizer)
    for index in ids:
        if not isinstance(index, int) or isinstance(index, bool) or index not in control:
            allowed = ", ".join(f"{i} ({tokenizer.convert_ids_to_tokens(i)})" for i in sorted(control)[:20])
            raise ValueError(
                f"eos_token_id={chosen!r}: {index!r} is no special or added token; allowed: {allowed}. A text that is "
                "to end an episode is given as stop"
            )
    if not ids:
        raise ValueError("eos_token_id must hold at least one id: no episode could end before its budget")
    return tuple(dict.fromkeys(ids))


class TextCodec:
    """Encodes and decodes the texts of one tokenizer. `codec` makes it, and keeps it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.special, self.control = special_ids(tokenizer), control_ids(tokenizer)
        # GPT-2 names its EOS as the token for unknown words too: then there is none.
        ends = (tokenizer.eos_token_id, tokenizer.bos_token_id)
        self.unknown_id = None if tokenizer.unk_token_id in ends else tokenizer.unk_token_id
        self.forbidden = (self.special | {NO_TOKEN}) - {self.unknown_id}
        """Ids that no text becomes."""
        names = sorted((str(tokenizer.convert_ids_to_tokens(i)) for i in self.special), key=len, reverse=True)
        self.name = re.compile("|".join(map(re.escape, names)) or "(?!)")
        """Finds the name of a special token in a text."""
        self._backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
        self._blind: Tokenizer | None = None
        self._context = _context(tokenizer)

    # -- encoding -----------------------------------------------------------------------------------------------------

    def encode(self, text: str, *, begin: bool = False, unknown: Unknown = "raise") -> list[int]:
        """Token ids of a text.

        Args:
            begin: with what the tokenizer puts around every text, such as a BOS.
            unknown: what to do with words that have no token.

        Raises:
            ValueError: naming a word that has no token.
        """
        return self.known(text, self.places(text, begin), unknown)

    def places(self, text: str, begin: bool) -> Encoded:
        """A text's tokens and where they stand in it; what has no token is among them."""
        return self._encode_all([text], begin)[0]

    def known(self, text: str, encoded: Encoded, unknown: Unknown = "raise") -> list[int]:
        """The ids of a text but for words that have no token.

        Raises:
            ValueError: there is such a word, and `unknown` is "raise".
        """
        wrong = self._wrong(encoded)
        if wrong and unknown == "raise":
            # Of a tokenizer written in Python it is not known where a token stands.
            rest = text[encoded.begins[wrong[0]] :].split(maxsplit=1) if encoded.begins else []
            word = repr(rest[0]) if rest else "a word"
            raise ValueError(
                f"the tokenizer {self.tokenizer.name_or_path!r} has no token for {word}, and none for unknown words: "
                f"{text[:60]!r}"
            )
        return [i for n, i in enumerate(encoded.ids) if n not in set(wrong)]

    def _wrong(self, encoded: Encoded) -> list[int]:
        """The places of words that have no token."""
        if self.forbidden.isdisjoint(encoded.ids):
            return []
        return [n for n, i in enumerate(encoded.ids) if i in self.forbidden and not encoded.added[n]]

    def _encode_all(self, texts: Sequence[str], begin: bool) -> list[Encoded]:
        # 1. As the tokenizer encodes them, the names of special tokens split into letters.
        rows = self._by_backend(texts, begin) if self._backend is not None else self._by_python(texts, begin)
        # 2. Some know such a name as a word all the same. A copy does not.
        for n, row in enumerate(rows):
            if self._backend is not None and self._wrong(row) and NO_TOKEN not in row.ids:
                rows[n] = self._by_blind_copy(texts[n], begin) or row
        return rows

    def _by_blind_copy(self, text: str, begin: bool) -> Encoded | None:
        """None: the name has no letters in this vocabulary."""
        encoded = _unless_missing(lambda: self._blind_backend().encode(text, add_special_tokens=begin))
        if encoded is None:
            return None
        added = [bool(one) for one in encoded.special_tokens_mask]
        return Encoded(encoded.ids, added, [first for first, _ in encoded.offsets])

    def _by_backend(self, texts: Sequence[str], begin: bool) -> list[Encoded]:
        places = {"return_special_tokens_mask": True, "return_offsets_mapping": True}
        encoded = _unless_missing(lambda: self.tokenizer(list(texts), **self._arguments(begin), **places))
        if encoded is None:
            return [self._word_by_word(text, begin) for text in texts]
        columns = (encoded["input_ids"], encoded["special_tokens_mask"], encoded["offset_mapping"])
        return [
            Encoded(ids, [bool(one) for one in mask], [first for first, _ in offsets])
            for ids, mask, offsets in zip(*columns, strict=True)
        ]

    def _arguments(self, begin: bool) -> dict[str, Any]:
        # Not verbose: a text that is too long is the caller's to cut.
        return {"add_special_tokens": begin, "split_special_tokens": True, "verbose": False}

    def _word_by_word(self, text: str, begin: bool) -> Encoded:
        """A text of which a vocabulary of whole words lacks some, and lacks a token for those that it lacks."""
        row = self._by_backend([""], begin)[0]
        for match in re.finditer(r"\S+", text):
            ids = _unless_missing(functools.partial(self._ids, match.group(), begin=False)) or [NO_TOKEN]
            row = Encoded(row.ids + ids, row.added + [False] * len(ids), row.begins + [match.start()] * len(ids))
        return row

    def _by_python(self, texts: Sequence[str], begin: bool) -> list[Encoded]:
        rows = []
        for text in texts:
            alone = self._ids(text, begin=False)
            ids = self._ids(text, begin=True) if begin else alone
            # Where the text's own tokens stand among those that were put around them.
            spare = range(len(ids) - len(alone) + 1)
            first = next((n for n in spare if ids[n : n + len(alone)] == alone), 0)
            rows.append(Encoded(ids, [not first <= n < first + len(alone) for n in range(len(ids))], []))
        return rows

    def _ids(self, text: str, begin: bool) -> list[int]:
        return list(cast("list[int]", self.tokenizer(text, **self._arguments(begin))["input_ids"]))

    def _blind_backend(self) -> Tokenizer:
        if self._blind is None:
            assert self._backend is not None
            special = sorted(self.forbidden - {NO_TOKEN})
            self._blind = _blind_copy(self._backend, {str(self.tokenizer.convert_ids_to_tokens(i)) for i in special})
        return self._blind

    # -- one text behind another --------------------------------------------------------------------------------------

    def behind(self, text: str, *, unknown: Unknown = "raise") -> list[int]:
        """Token ids of a text that stands behind another one, whichever that is."""
        # Behind what keeps to itself: a letter would merge with a letter, a line break with a line break.
        for anchor in ("\n", ":", ".") if text[:1].isalnum() else ("a", "\n", ":"):
            rest = self._rest(*self._encode_all([anchor, anchor + text], begin=False))
            if rest is not None:
                return self.known(anchor + text, rest, unknown)
        return self.encode(text, unknown=unknown)

    def completions(self, prompt: str, texts: Sequence[str], *, unknown: Unknown = "raise") -> list[list[int]]:
        """Token ids of texts that stand behind a prompt: those of both together, less the prompt's."""
        first, *wholes = self._encode_all([prompt, *(prompt + text for text in texts)], begin=True)
        completions = []
        for text, whole in zip(texts, wholes, strict=True):
            rest = self._rest(first, whole)
            # None: a token spans the end of the prompt, and a policy that reads the prompt could not write it.
            ids = self.behind(text, unknown=unknown) if rest is None else self.known(prompt + text, rest, unknown)
            completions.append(ids)
        return completions

    def _rest(self, first: Encoded, whole: Encoded) -> Encoded | None:
        """The tokens of a whole behind those of its beginning; None where a token spans the two."""
        first, whole = first.open(), whole.open()
        size = len(first.ids)
        # An unknown word before the cut may have swallowed what stands behind it.
        last = first.part(size - 1)
        if size == 0 or self._wrong(last) or last.ids == [self.unknown_id] or whole.ids[:size] != first.ids:
            return None
        return whole.part(size)

    # -- conversations ------------------------------------------------------------------------------------------------

    def chat(self, chat: Chat, *, answered: bool = False) -> list[int]:
        """Token ids of a conversation by the tokenizer's chat template; special tokens are the template's only.

        Args:
            answered: the last turn is the answer; else the template begins one.

        Raises:
            BadRow: the template refuses the conversation.
        """
        # Marked before the template writes, so that the names in what people say can be told from its own.
        marked = [{**turn, "content": self._marked(turn["content"])} for turn in chat]
        text = write_chat(Chat(marked, self._marked(chat.tools)), self.tokenizer, answered=answered)
        # [template, name, template, name, ..., template]; a mark that the template has parted from its name is None
        marks = f"{MARK_BEGIN}({self.name.pattern}){MARK_END}|[{MARK_BEGIN}{MARK_END}]"
        first, *pieces = re.split(marks, text)
        ids = self._template_ids(first)
        for n, piece in enumerate(pieces):
            if piece:
                ids += self.behind(piece) if n % 2 == 0 else self.template(piece)
        return ids

    def _marked(self, value: Any) -> Any:
        """What people wrote, in whatever it stands, with marks around the names of special tokens."""
        if isinstance(value, str):
            return self.name.sub(rf"{MARK_BEGIN}\g<0>{MARK_END}", _unmarked(value))
        if isinstance(value, Mapping):
            return {name: self._marked(one) for name, one in value.items()}
        return [self._marked(one) for one in value] if isinstance(value, list) else value

    def template(self, text: str) -> list[int]:
        """Token ids of what a chat template writes behind something: names of special tokens are tokens."""
        if not text:
            return []
        # Behind a line break, since the tokenizer may put a space before every text.
        break_ids, more = self._template_ids("\n"), self._template_ids("\n" + text)
        return more[len(break_ids) :] if more[: len(break_ids)] == break_ids else self._template_ids(text)

    def _template_ids(self, text: str) -> list[int]:
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=False, verbose=False)
        return list(cast("list[int]", encoded["input_ids"]))

    # -- decoding -----------------------------------------------------------------------------------------------------

    def decode(self, ids: Sequence[int], *, begin: bool = False, shown: frozenset[int] = frozenset()) -> str:
        """The text of token ids, without special tokens, as it stands behind another text.

        Args:
            begin: nothing stands before it, so that the space is dropped which some tokenizers put before every text.
            shown: special tokens that are written by their names.
        """
        text = [i for i in ids if i not in self.special or i in shown]
        # Behind a word: tokenizers of sentencepiece's kind drop the space that a text begins with.
        context = [] if begin else self._context
        word, whole = self._decode(context), self._decode([*context, *text])
        return whole[len(word) :] if whole.startswith(word) else self._decode(text)

    def _decode(self, ids: list[int]) -> str:
        if not ids:
            return ""
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # of one list; a list of lists would give a list
        return text


def codec(tokenizer: PreTrainedTokenizerBase) -> TextCodec:
    """The TextCodec of a tokenizer, as its special tokens are now."""
    names = (tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token)
    return _codec(tokenizer, len(tokenizer), names, tuple(tokenizer.all_special_ids))


@functools.lru_cache(maxsize=8)
def _codec(tokenizer: PreTrainedTokenizerBase, *state: object) -> TextCodec:
    return TextCodec(tokenizer)


def cut_beginning(ids: list[int], tokenizer: PreTrainedTokenizerBase, most: int) -> list[int]:
    """The last tokens of a dialogue, whose last turn is answered; a BOS stays first."""
    first = ids[: int(len(ids) > most and ids[0] == tokenizer.bos_token_id)]
    return first + ids[len(first) :][-(most - len(first)) :]


def encode_completions(
    prompt: str | Chat,
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int | None = None,
    *,
    end_ids: Sequence[int] = (),
    unknown: Unknown = "raise",
) -> list[list[int]]:
    """Token ids of finished completions behind their prompt, each with one end token.

    Args:
        prompt: the whole prompt, also where the policy will read it cut.
        texts: an end token's name that one is written with counts as its end.
        max_new_tokens: a longer completion loses its end and the end token: nobody must learn to stop in mid-sentence.
        end_ids: tokens that end a completion, the usual one first; none: the tokenizer's EOS.
        unknown: what becomes of words that have no token.

    Raises:
        ValueError: naming a word that has no token.
    """
    text_codec = codec(tokenizer)
    ends = {str(tokenizer.convert_ids_to_tokens(i)): i for i in (*end_ids, tokenizer.eos_token_id)}
    if isinstance(prompt, Chat):
        completions = [_answer(prompt, text, text_codec, ends) for text in texts]
    else:
        parts = [split_end(text, ends) for text in texts]
        encoded = text_codec.completions(prompt, [text for text, _ in parts], unknown=unknown)
        completions = [[*ids, end] for ids, (_, end) in zip(encoded, parts, strict=True)]
    return [ids[:max_new_tokens] for ids in completions]


def split_end(text: str, ends: Mapping[str, int]) -> tuple[str, int]:
    """A completion without the names of end tokens at its end, and the token that ends it.

    Args:
        ends: their names and ids, the usual one first.
    """
    end = next(iter(ends.values()))
    while name := next((name for name in ends if text.rstrip().endswith(name)), None):
        text, end = text.rstrip().removesuffix(name), ends[name]
    return text, end


def _answer(chat: Chat, text: str, text_codec: TextCodec, ends: Mapping[str, int]) -> list[int]:
    """The answer to a conversation, with the end that the chat template gives it."""
    text, end = split_end(text, ends)
    asked = text_codec.chat(chat)
    whole = text_codec.chat(Chat([*chat, {"role": "assistant", "content": text}], chat.tools), answered=True)
    rest = whole[len(asked) :]
    last = next((n for n, i in enumerate(rest) if i in ends.values()), None)
    # A template that writes an answered turn otherwise than it begins one, or ends none: the text alone, and EOS.
    if whole[: len(asked)] != asked or last is None:
        return [*text_codec.behind(text), end]
    return rest[: last + 1]


def _unless_missing(encode: Callable[[], T]) -> T | None:
    """What encoding gives; None where a word has no token, and the vocabulary none for unknown words."""
    try:
        return encode()
    except Exception as error:
        if MISSING_UNKNOWN not in str(error):
            raise
        return None


def _unmarked(text: str) -> str:
    return text.replace(MARK_BEGIN, "").replace(MARK_END, "")


def _context(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A word that texts are decoded behind, where the tokenizer drops the space that a text begins with."""
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    word = next((i for t, i in vocab if t[:1] == SPACE_MARK and t[1:].isascii() and t[1:].isalpha()), None)
    if word is None:
        return []
    once, twice = (str(tokenizer.decode([word] * n, clean_up_tokenization_spaces=False)) for n in (1, 2))
    return [word] if twice == f"{once} {once}" else []


def _blind_copy(backend: Tokenizer, names: set[str]) -> Tokenizer:
    """A copy of a tokenizer with the same ids that knows some of its tokens by names which no text has."""
    from tokenizers import Tokenizer

    state = json.loads(backend.to_str())
    model = state["model"]
    # A token for unknown words has to keep its name.
    secret = {name: secrets.token_hex(16) for name in names - {model.get("unk_token")}}
    if isinstance(model["vocab"], dict):
        model["vocab"] = {secret.get(name, name): index for name, index in model["vocab"].items()}
    else:
        model["vocab"] = [[secret.get(name, name), score] for name, score in model["vocab"]]
    if model.get("merges"):
        pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & secret.keys()]
    for token in state["added_tokens"]:
        token["content"] = secret.get(token["content"], token["content"])
    copy = Tokenizer.from_str(json.dumps(state))
    copy.encode_special_tokens = True
    copy.no_truncation()
    copy.no_padding()
    return copy
