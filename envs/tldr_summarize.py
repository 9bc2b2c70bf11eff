"""TLDRSummarize-v0: sum up a forum post in a sentence or three."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from importlib.resources import files
from typing import Any, ClassVar

from textrl_gym.core import PromptSource, Row
from textrl_gym.data import prompts
from textrl_gym.mdp.task import Task
from textrl_gym.worlds.tldr import KINDS, TLDRCorpus, corrupted_summaries, mediocre_summary, slots_of
from textrl_gym.worlds.tldr_grammar import bank, compose

ID = "TLDRSummarize-v0"
ASSETS = str(files("textrl_gym") / "assets" / "tldr")
# A sentence with its end: texts that were cut off lose their last, unfinished one.
_SENTENCE = re.compile(r"[^\s.?][^.?]*[.?]")
MEDIOCRE = {"swap": 0.15, "generic": 0.2, "ask": 0.45, "detail": 0.65}
"""How poor the summaries are that the initial policy learns from: gold about 0.6; its own noise takes a third of it."""


class MediocreRows:
    """The posts of a corpus with poor summaries as completions: training data of the bundled initial policy."""

    def __init__(self, corpus: TLDRCorpus) -> None:
        self.corpus = corpus

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, index: int, /) -> Row:
        """The row with four poor summaries."""
        row = self.corpus[index]
        # Seeded by the row, so that a training run sees the same poor summaries whatever the order of its batches.
        rng = random.Random(f"mediocre/{self.corpus.split}/{self.corpus.seed}/{index}")
        return {**row, "completions": [mediocre_summary(row, rng, **MEDIOCRE) for _ in range(4)]}

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))


def wordings(row: Row, n: int, seed: int) -> list[str]:
    """The row's reference and n - 1 summaries of the same facts in other words."""
    rng = random.Random(seed)
    return [row["completion"], *(" " + compose(slots_of(row["facts"]), rng) for _ in range(n - 1))]


def _damage(text: str, row: dict[str, Any], rng: random.Random) -> str:
    """The text with one word lost, doubled or out of place, cut off, or with a sentence more: what samples do."""
    words = text.split(" ")
    at = rng.randrange(1, max(2, len(words) - 1))
    fault = rng.choice(("lost", "doubled", "swapped", "cut", "more"))
    if fault == "lost":
        del words[at]
    elif fault == "doubled":
        words.insert(at, words[at])
    elif fault == "swapped" and at + 1 < len(words):
        words[at], words[at + 1] = words[at + 1], words[at]
    elif fault == "cut":
        del words[max(4, at) :]
    else:
        words += mediocre_summary(row, rng, generic=0.5, ask=0.3, detail=0.2).strip().split(" ")
    return " ".join(words)


def _corrupt_slots(slots: dict[str, str], row: dict[str, Any], number: int, rng: random.Random) -> dict[str, str]:
    """The slots with `number` of their values (at most as many as there are) taken from distractors or another post."""
    # Mostly from the post itself: a distractor is what a policy copies by mistake, and only reading the post tells it
    # from the fact. A stranger's value is usually not in the post at all.
    slots = dict(slots)
    kinds = [kind for kind in KINDS if (kind in slots or (kind == "who" and "name" in slots))]
    stranger = TLDRCorpus("train", seed=rng.getrandbits(32))[0]["facts"]
    for kind in rng.sample(kinds, min(number, len(kinds))):
        wrong = rng.choice(row["distractors"][kind]) if rng.random() < 0.7 else stranger[kind]["value"]
        if kind == "who":
            relation, name = wrong.rsplit(" ", 1)
            slots |= rng.choice(({"rel": relation}, {"name": name}, {"rel": relation, "name": name}))
            if rng.random() < 0.2:
                slots["she"] = "he" if slots["she"] == "she" else "she"
        elif kind == "amount" and rng.random() < 0.3:
            slots["role"] = rng.choice(sorted(set(bank()["summary"]["amount"]) - {slots["role"]}))
        else:
            slots[kind] = wrong
    return slots


def _patchwork(text: str, row: dict[str, Any], rng: random.Random) -> str:
    """A summary and sentences of others of the same post: well-formed and true, but facts are said again.

    A policy that was optimised against a reward model without these asked the question of the post twice or, at a high
    learning rate, five times.
    """
    every = slots_of(row["facts"])
    pool = [text for _ in range(4) for text in _SENTENCE.findall(compose(every, rng))]
    sentences = _SENTENCE.findall(text)
    if rng.random() < 0.5:
        sentences = sentences[: rng.randint(1, len(sentences))]
    for _ in range(rng.choice((1, 1, 2, 3, 4))):
        sentences.insert(rng.randint(0, len(sentences)), rng.choice(pool + sentences))
    return " " + " ".join(sentences)


def _told_again(text: str, slots: dict[str, str], rng: random.Random) -> str:
    """The summary of these slots with one of its sentences told twice or, at the end, told again in other words."""
    sentences = _SENTENCE.findall(text)
    if rng.random() < 0.5:
        at = rng.randrange(len(sentences))
        sentences.insert(rng.randint(at + 1, len(sentences)), sentences[at])
    else:
        sentences.append(rng.choice(_SENTENCE.findall(compose(slots, rng))))
    return " " + " ".join(sentences)


class ReferenceRows(MediocreRows):
    """The posts of a corpus with three wordings of their references: what the fluent model learns.

    From one wording alone the model would learn that wording's words by heart.
    """

    def __getitem__(self, index: int, /) -> Row:
        """The row with three summaries of the same facts."""
        row = self.corpus[index]
        return {**row, "completions": wordings(row, 3, index)}


class TLDRSummarize(Task):
    """Sum up a forum post after "TL;DR:", as in "Learning to summarize from human feedback" (Stiennon et al. 2020).

    ## Description
    A post in the prompt format of the TL;DR data set (subreddit, title, post) ends in "TL;DR:"; the agent writes the
    summary token by token. The embedded posts are procedural: each tells seven facts about one person (who, what
    happened, when, where, an amount, a feeling, the question asked) among sentences that mention other people, amounts
    and places. There are more than 10^6 of them, and no post of one split occurs in another. Real posts are given by
    `dataset=`: a file, folder or Hub id in the schema of trl-lib/tldr or of
    vwxyzjn/summarize_from_feedback_tldr_3_filtered.

    ## Observation Space
    `Dict(input_ids: Box int64 [L], attention_mask: Box int8 [L])`, L = max_prompt_tokens + max_new_tokens = 224. The
    prompt is left-padded into the first 176 places, so generated token t always stands at place 176 + t.

    ## Action Space
    `Discrete(2048)`: the next token of the bundled byte-level BPE tokenizer (with `tokenizer=`, that one's vocabulary).

    ## Reward
    0 at each step but the last, then the score of the bundled reward model, which was trained on the pairwise choices
    of simulated annotators and normalised: references have mean 0, the initial policy's samples standard deviation 1.
    With kl_coef > 0 each step costs kl_coef * KL of the policy to the reference.

    ## Episode End
    Terminated by "<|endoftext|>" or a stop string; truncated after max_new_tokens. A truncated text is still scored.

    ## Information
    At the end: `score`, `prompt`, `completion`, `reference` (the row's summary), `stop_reason`. The gold score
    `tldr_gold`, never trained on by default, is what `evaluate` reports beside the score: facts covered, nothing
    invented, well-formed, brief, in [0, 1]; it reads the columns `facts` and `distractors` that only embedded rows
    have.

    ## Arguments
    Those of every text environment: `split`, `dataset`, `tokenizer`, `reward`, `max_prompt_tokens`, `max_new_tokens`,
    `stop`, `group_size`, `kl_coef`, `kl_estimator`, `reference`, `policy_logprob`, `missing_eos_penalty`, `bad_rows`,
    `template`, `system_prompt`, `few_shot`, `device`, `array`, `render_mode`.

    ```python
    env = gym.make("TLDRSummarize-v0", reward="tldr_gold", split="validation")
    ```

    ## References
    - Stiennon et al. 2020, Learning to summarize from human feedback, https://arxiv.org/abs/2009.01325
    - Völske et al. 2017, TL;DR: Mining Reddit to Learn Automatic Summarization, https://aclanthology.org/W17-4508
    - Huang et al. 2024, The N+ Implementation Details of RLHF with PPO, https://arxiv.org/abs/2403.17031
    - Dubois et al. 2023, AlpacaFarm (simulated annotators), https://arxiv.org/abs/2305.14387

    ## Version History
    - v0: the first version.
    """

    id = ID
    max_prompt_tokens = 176  # holds 99.5% of the embedded prompts whole; the longest have 182
    max_new_tokens = 48  # references have 28 to 50 tokens, the median is 36
    model = f"{ASSETS}/policy"
    reward_model_path = f"{ASSETS}/reward_model"
    reward = "reward_model"
    gold = "tldr_gold"
    gold_scale = (0.0, 1.0)
    # 0.05 let PPO and GRPO go to 9 to 12 nats for no more gold: the reward's standard deviation is 1 at the start.
    kl_coef = 0.1
    keep_suffix = "\n\nTL;DR:"
    recipe: ClassVar = {
        # After 1,500 updates its noise at temperature 1 still costs a fifth of its gold.
        "fluent": {"steps": 4500},
        # A policy that unlearns is mediocre by its behaviour. One trained from scratch on poor summaries could not copy
        # well, and 50 updates on the gold score itself took it to 0.61 only, where this one went to 0.75 in 20.
        "policy": {"steps": 250, "learning_rate": 1e-3},
        "reward_model": {},
    }

    def rows(self, split: str, dataset: str | None = None) -> PromptSource:
        """The posts of a split with their reference summaries."""
        return TLDRCorpus(split) if dataset is None else prompts.load_rows(dataset, split)

    def references(self, split: str) -> PromptSource:
        """Training data of the fluent model."""
        return ReferenceRows(TLDRCorpus(split))

    def demonstrations(self, split: str) -> PromptSource:
        """Training data of the initial policy: poor summaries, so that RL has room."""
        return MediocreRows(TLDRCorpus(split))

    def corrupted(self, row: Row, rng: random.Random, n: int) -> list[tuple[str, str]]:
        """`n` pairs of a true summary and the same with wrong values or repeated facts."""
        post = dict(row)
        pairs = []
        for _ in range(n):
            slots = slots_of(post["facts"])
            for slot in rng.sample(("when", "where", "amount", "feeling", "ask"), rng.randint(0, 3)):
                del slots[slot]
            # Both are worded by one seed, so that they differ in nothing but their values.
            wording = rng.getrandbits(32)
            wrong = _corrupt_slots(slots, post, rng.choice((0, 0, 1, 1, 2, 3, 4)), rng)
            true, false = (" " + compose(some, random.Random(wording)) for some in (slots, wrong))
            pairs.append((true, _told_again(false, slots, rng) if rng.random() < 0.3 else false))
        return pairs

    def candidates(self, row: Row, rng: random.Random, n: int) -> list[str]:
        """`n` summaries from perfect to poor, for annotators to compare beside the policy's samples.

        They span what a policy that is optimised against the reward model may write: every fact or most of them, in
        other words; the same sentences with one value, or several, from a distractor (nothing else differs, so that
        only reading the post can tell them apart); the same fact said again; a word lost, doubled or out of
        place; and the gross flaws of `corrupted_summaries`.
        """
        post = dict(row)
        every = slots_of(post["facts"])

        def worded(slots: dict[str, str], wording: int) -> str:
            return " " + compose(slots, random.Random(wording))

        # Two wordings for the seven makers: pairs of the same wording differ in their facts alone.
        first, second = rng.getrandbits(32), rng.getrandbits(32)
        most = dict(every)
        for slot in rng.sample(("when", "where", "amount", "feeling", "ask"), rng.randint(1, 4)):
            del most[slot]
        makers = [
            lambda: worded(every, first),
            lambda: worded(_corrupt_slots(every, post, 1, rng), first),
            lambda: worded(most, second),
            lambda: worded(_corrupt_slots(most, post, rng.choice((1, 1, 2, 3)), rng), second),
            lambda: corrupted_summaries(post, rng, 1)[0] if rng.random() < 0.5 else mediocre_summary(post, rng),
            lambda: _patchwork(worded(every, first), post, rng),
            lambda: _damage(worded(every if rng.random() < 0.5 else most, rng.getrandbits(32)), post, rng),
        ]
        return [makers[i % len(makers)]() for i in range(n)]
