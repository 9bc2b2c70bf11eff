"""tldr_gold: the true quality of a summary of an embedded post, in [0, 1].

    gold = coverage * precision * form * brevity

- coverage: the weight of the facts stated with their right values and in their right roles (WEIGHTS sums to 1).
- precision: right / (right + wrong). Wrong: a value of a distractor, an invented value, a fact stated twice.
- form: (1 - bad)^FORM_POWER * (1 - FRAGMENT_COST * broken). bad: the share of word bigrams and trigrams, values
  abstracted to typed slots, that the summary grammar cannot produce; it falls smoothly. broken: the share of words in
  sentences that do not parse as clauses and joints; it catches what n-grams cannot see, as a sentence with no verb
  ("Anna, my sister, and I am sad."). Any grammatical recombination of clauses with any values has form 1.
- brevity: 1 up to FREE_WORDS words, falling to 0 at MAX_WORDS.

A fact counts only where the n-grams around its value belong to the grammar: a list of keywords states nothing.
The parts are multiplied so that none can be traded away. That a template kept without its value ("since was") must cost
was learnt the hard way: a policy trained on coverage and precision alone finds it, because wrong values cost and wrong
grammar did not.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise, product
from typing import Any

from textrl_gym.worlds.tldr_grammar import bank, capitalised

WEIGHTS = {
    "rel": 0.10,
    "name": 0.12,
    "act": 0.13,
    "thing": 0.13,
    "ask": 0.16,
    "amount": 0.12,
    "when": 0.08,
    "where": 0.08,
    "feeling": 0.08,
}
PRONOUN_WEIGHT = 0.05  # what a wrong "she" or "he" costs; a right one earns nothing
# One bad n-gram of 50 costs 8% of the score: a policy must not find a wrong word cheaper than a left-out fact.
FORM_POWER = 4
FRAGMENT_COST = 0.3
FREE_WORDS, MAX_WORDS = 32, 64  # a reference has 30 words at most but for one in 2,000 (tldr_grammar.MAX_SUMMARY_WORDS)

SENTENCE_START, CUT = "<start>", "<cut>"  # before a sentence; after one that does not end
WORD = re.compile(r"\{\w+\}|\$\d+|\w+(?:[-']\w+)*|[^\w\s]")
ENDS = frozenset(".?")
CAPITAL_SLOTS = ("when", "where")  # slots whose values change their first letter at the head of a sentence

Value = str | tuple[str, str]  # of a slot; an event's is (act, thing)
Token = tuple[str, Value | None]  # a word with None, or a slot "{kind}" with its value
Ngram = tuple[str, ...]


# ------------------------------------------------------------------------------------- the language of the summaries


def _variants(template: str) -> Iterator[str]:
    """A template with every choice of its [groups]; a template of groups only keeps at least one."""
    parts = re.split(r"\[([^\]]*)\]", template)  # groups stand at the odd places
    fixed = "".join(parts[::2])
    for kept in product((True, False), repeat=len(parts) // 2):
        if any(kept) or "{" in fixed:
            yield "".join(p for at, p in enumerate(parts) if at % 2 == 0 or kept[at // 2])


def _cores() -> Iterator[list[str]]:
    summary = bank()["summary"]
    for template in [*summary["core"], *summary["no_event"]]:
        for variant in _variants(template):
            for who in [*summary["who"], *summary["who_part"]]:
                yield _words(variant.replace("{who}", who))


def _words(text: str) -> list[str]:
    return WORD.findall(text.replace("{she}", "{pron}"))


def _headed(words: list[str]) -> list[str]:
    """The words of a clause at the head of a sentence."""
    first = words[0]
    if first[1:-1] in CAPITAL_SLOTS or first == "{pron}":
        return [f"{{{capitalised(first[1:-1])}}}", *words[1:]]
    return [first if first.startswith("{") else capitalised(first), *words[1:]]


def _bigrams_and_trigrams(words: Sequence[str]) -> Iterator[Ngram]:
    """Bigrams and trigrams."""
    yield from pairwise(words)
    yield from zip(words, words[1:], words[2:], strict=False)


@cache
def clauses() -> dict[str, list[list[str]]]:
    """Every clause of the summary grammar, values abstracted, by kind of clause."""
    summary = bank()["summary"]
    templates_by_kind: dict[str, list[list[str]]] = {"core": list(_cores())}
    for kind in ("left", "feeling", "question", "wonder"):
        templates_by_kind[kind] = [_words(variant) for template in summary[kind] for variant in _variants(template)]
    templates_by_kind["amount"] = [
        _words(template) for templates in summary["amount"].values() for template in templates
    ]
    return templates_by_kind


@cache
def language() -> frozenset[Ngram]:
    """Every bigram and trigram of the summary grammar, values abstracted.

    A sentence is clause (joint clause)*. A clause has two words or more, and three where a joint comes before it, so
    the n-grams of all sentences are those of clauses, of clause ends and a full stop, and of ends joined to heads.
    """
    grams: set[Ngram] = set()
    tails: set[Ngram] = set()
    for kind, versions in clauses().items():
        for words in versions:
            end = "?" if kind == "question" else "."
            for version in (words, _headed(words)):
                grams.update(_bigrams_and_trigrams(version))
                grams.update(_bigrams_and_trigrams([*version[-2:], end]))
            grams.update(_bigrams_and_trigrams([SENTENCE_START, *_headed(words)[:2]]))
            if kind != "question":
                tails.update((tuple(words[-2:]), tuple(_headed(words)[-2:])))  # they differ in a two-word clause
    for kind, joints in bank()["summary"]["joints"].items():
        heads = {tuple(words[:2]) for words in clauses()[kind]}
        for tail, joint, head in product(tails, joints, heads):
            grams.update(_bigrams_and_trigrams([*tail, *_words(joint), *head]))
    return frozenset(grams)


@cache
def _openings() -> dict[Ngram, bool]:
    """Clauses as they stand at the head of a sentence -> whether it is a question."""
    return {tuple(_headed(words)): kind == "question" for kind, versions in clauses().items() for words in versions}


@cache
def _continuations() -> dict[Ngram, bool]:
    """Joints with the clause after them -> whether it is a question."""
    return {
        (*_words(joint), *words): kind == "question"
        for kind, joints in bank()["summary"]["joints"].items()
        for joint in joints
        for words in clauses()[kind]
    }


@cache
def _lengths(pieces: Callable[[], dict[Ngram, bool]]) -> tuple[int, ...]:
    return tuple(sorted({len(piece) for piece in pieces()}))


def parses(words: Sequence[str]) -> bool:
    """Whether SENTENCE_START, words ..., end is a sentence of the grammar: a clause, then joints with clauses."""
    last = len(words) - 1
    open_at = [(1, _openings)]  # where a piece may start, and of which kind
    while open_at:
        at, pieces = open_at.pop()
        for length in _lengths(pieces):
            question = pieces().get(tuple(words[at : at + length])) if at + length <= last else None
            if question is None:
                continue
            if at + length == last and words[last] == ("?" if question else "."):
                return True
            if not question:
                open_at.append((at + length, _continuations))
    return False


@cache
def roles() -> dict[Ngram, frozenset[str]]:
    """The two words before an amount -> the parts that the amount may play there."""
    roles_by_ngram: dict[Ngram, set[str]] = defaultdict(set)
    for role, templates in bank()["summary"]["amount"].items():
        for template in templates:
            words = _words(template)
            at = words.index("{amount}")
            for version in (words, _headed(words)):
                roles_by_ngram[tuple(version[at - 2 : at])].add(role)
    return {before: frozenset(parts) for before, parts in roles_by_ngram.items()}


@cache
def lexicon() -> dict[str, list[tuple[tuple[str, ...], Token]]]:
    """First word -> the values that start with it, longest first, as (words, (slot, value))."""
    values: set[tuple[str, Token]] = set()
    data = bank()
    groups = [data["bystanders"], *(sub["relations"] for sub in data["subreddits"].values())]
    values |= {(r, ("{rel}", r)) for group in groups for relations in group.values() for r in relations}
    values |= {(name, ("{name}", name)) for names in data["names"].values() for name in names}
    values |= {(f, ("{feeling}", f)) for f in data["feelings"]}
    places = {place for sub in data["subreddits"].values() for place in sub["where"]}
    for slot, pool in (("when", data["when"]), ("where", places)):
        values |= {(v, (f"{{{slot}}}", v)) for v in pool}
        values |= {(capitalised(v), (f"{{{capitalised(slot)}}}", v)) for v in pool}
    for sub in data["subreddits"].values():
        asks = {ask.replace("{him}", him) for ask in sub["ask"] for him in ("her", "him")}
        values |= {(ask, ("{ask}", ask)) for ask in asks}
        pairs = [(did, thing) for family in sub["events"] for did in family["did"] for thing in family["things"]]
        values |= {(f"{did} {thing}", ("{event}", (did, thing))) for did, thing in pairs}
    for she in ("she", "he"):
        values |= {(she, ("{pron}", she)), (capitalised(she), ("{Pron}", she))}
    index: dict[str, list[tuple[tuple[str, ...], Token]]] = defaultdict(list)
    for text, token in values:
        words = tuple(WORD.findall(text))
        index[words[0]].append((words, token))
    for entries in index.values():
        entries.sort(key=lambda entry: (-len(entry[0]), entry[0]))
    return dict(index)


# ----------------------------------------------------------------------------------------------------------- scoring


def abstract(text: str) -> list[Token]:
    """The text as words and typed slots: "Anna broke my lamp." -> {name} {event} "."."""
    # Braces would let a text write slots itself ("{name}") and pass for grammatical without a value.
    words = WORD.findall(text.replace("{", " ").replace("}", " "))
    index = lexicon()
    tokens: list[Token] = []
    at = 0
    while at < len(words):
        # The longest value first: of two that begin alike the shorter one would leave words over that are no value.
        for phrase, token in index.get(words[at], ()):
            if tuple(words[at : at + len(phrase)]) == phrase:
                tokens.append(token)
                at += len(phrase)
                break
        else:
            tokens.append(("{amount}", words[at]) if words[at][0] == "$" and len(words[at]) > 1 else (words[at], None))
            at += 1
    return tokens


def sentences(tokens: list[Token]) -> Iterator[list[Token]]:
    """Sentences with SENTENCE_START before and, where no full stop or question mark ends them, CUT after."""
    sentence: list[Token] = [(SENTENCE_START, None)]
    for token in tokens:
        sentence.append(token)
        if token[0] in ENDS:
            yield sentence
            sentence = [(SENTENCE_START, None)]
    if len(sentence) > 1:
        yield [*sentence, (CUT, None)]


class _Ledger:
    """What a summary states: the weight of right and wrong statements."""

    def __init__(self, facts: dict[str, dict[str, Any]]) -> None:
        who, event = facts["who"], facts["event"]
        self.facts = facts
        self.true: dict[str, Any] = {"rel": who["relation"], "name": who["name"], "thing": event["thing"]}
        self.true |= {kind: facts[kind]["value"] for kind in ("ask", "amount", "when", "where", "feeling")}
        self.seen: set[str] = set()
        self.right = 0.0
        self.wrong = 0.0

    def state(self, slot: str, value: Value, valid: bool, before: Ngram) -> None:
        """Book one value; `valid`: the grammar allows a value of this kind here."""
        kind = slot[1:-1].lower()
        if kind == "pron":
            self.wrong += PRONOUN_WEIGHT * (value != self.facts["who"]["pronoun"])
        elif kind == "event":
            self._book("act", value[0] in self.facts["event"]["act"], valid)
            self._book("thing", value[1] == self.true["thing"], valid)
        elif kind == "amount":
            # The right number in a wrong role is half of the fact.
            part = 1.0 if self.facts["amount"]["role"] in roles().get(before, frozenset()) else 0.5
            self._book("amount", value == self.true["amount"], valid, part)
        else:
            self._book(kind, value == self.true[kind], valid)

    def _book(self, kind: str, is_true: bool, valid: bool, part: float = 1.0) -> None:
        weight = WEIGHTS[kind]
        if not is_true or kind in self.seen:  # invented, a distractor's, or said before
            self.wrong += weight
        elif valid:
            self.right += part * weight
            self.wrong += (1 - part) * weight
            self.seen.add(kind)


def score_parts(facts: dict[str, dict[str, Any]], completion: str) -> dict[str, float]:
    """The parts of the gold score of one completion: coverage, precision, form, brevity, and gold, their product."""
    allowed = language()
    ledger = _Ledger(facts)
    total = bad = size = broken = 0
    for sentence in sentences(abstract(completion)):
        words = [word for word, _ in sentence]
        bigrams = [gram in allowed for gram in pairwise(words)]
        trigrams = [gram in allowed for gram in zip(words, words[1:], words[2:], strict=False)]
        total += len(bigrams) + len(trigrams)
        bad += bigrams.count(False) + trigrams.count(False)
        size += len(words)
        # A share of words and not of sentences: else one long broken sentence would cost as little as a short one.
        broken += 0 if parses(words) else len(words)
        for at, (word, value) in enumerate(sentence):
            if value is not None:
                # The bigrams on both sides and the trigram centred on the value (there is always a start and an end).
                valid = bigrams[at - 1] and bigrams[at] and trigrams[at - 1]
                ledger.state(word, value, valid, tuple(words[max(at - 2, 0) : at]))
    stated = ledger.right + ledger.wrong
    parts = {
        "coverage": min(1.0, ledger.right),  # the weights add up to 1 only nearly, in floating point
        "precision": ledger.right / stated if stated else 0.0,
        "form": (1 - bad / total) ** FORM_POWER * (1 - FRAGMENT_COST * broken / size) if total else 0.0,
        "brevity": min(1.0, max(0.0, (MAX_WORDS - len(completion.split())) / (MAX_WORDS - FREE_WORDS))),
    }
    gold = parts["coverage"] * parts["precision"] * parts["form"] * parts["brevity"]
    return parts | {"gold": gold}


def reward(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
    """Gold scores in [0, 1], one a row (TRL's reward signature).

    Raises:
        ValueError: where the column `facts` is missing, which only rows of the embedded corpus have.
    """
    facts = columns.get("facts")
    if facts is None or any(row is None for row in facts):
        raise ValueError(
            "tldr_gold needs the column 'facts' of the embedded corpus (textrl_gym.worlds.tldr.TLDRCorpus); "
            f"columns given: {sorted(columns)}. For other data use a reward that needs no facts."
        )
    return [score_parts(row, completion)["gold"] for row, completion in zip(facts, completions, strict=True)]
