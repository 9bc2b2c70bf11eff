"""A causal LM of this machine as a judge, without a server: the log-probabilities of the labels after the question.

The question is written by the tokenizer's chat template where it has one, and the label is the first word of the reply;
without a template it stands behind a last line "Verdict:". Names of special tokens in the texts stay letters
(data.encoding). With reasons (chain of thought) the model writes them greedily, and the labels follow a line
"Verdict:" that is put behind them, as Lee et al. (2023, arXiv:2309.00267) do.

A label may be several tokens, and the beginning of another one ("1" and "10"):

    P(label) = prod_i p(token_i | question, tokens before), less that of the longer labels that begin with it

over the sum of all labels. Nothing is sampled: the same question gives the same answer.

Shape legend: B questions, K labels, L tokens of a question, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from textrl_gym.data.encoding import Chat, codec
from textrl_gym.functional import pad
from textrl_gym.llm.asking import LOCAL, Answered
from textrl_gym.llm.questions import PAIR, Form, fill_template
from textrl_gym.models import loading, positions
from textrl_gym.models.tokenizer import vocab_size
from textrl_gym.policy.policy import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_BATCH_TOKENS = 16384
"""Places in one batch, padding included."""
MOST_REASONS = 256
"""Tokens of reasons where the settings do not say how many."""
NO_TIE = ("A", "B")
"""A local model is asked for the better answer: a tie is that both are equally likely."""


class LongQuestionWarning(UserWarning):
    """A local judge reads more than its model was made for."""


@runtime_checkable
class ModelOwner(Protocol):
    """What a local judge needs of a task (`textrl_gym.mdp.task.Task` is one): its model, or one that it can load."""

    def load_tokenizer(self, name: str | None = None) -> PreTrainedTokenizerBase:
        """The tokenizer of a name, or the task's own."""
        ...

    def load_model(self, name: str | None = None, *, device: str | torch.device = "cpu") -> nn.Module:
        """The causal LM of a name, or the task's own."""
        ...


class LocalModel:
    """A causal LM that answers a judge's questions; see Answerer and the head of this file.

    Args:
        model: a causal LM of transformers, or a Policy.
        tokenizer: the model's own.
        form: of the questions, as `asking.shaped` gives it.
        name: for reports.
        most_reasons: tokens of the reasons, where the form asks for some.

    Raises:
        ValueError: the tokenizer cannot write the question, or writes two labels alike.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        form: Form,
        name: str = LOCAL,
        most_reasons: int = MOST_REASONS,
    ) -> None:
        loading.check_vocab(tokenizer, model.model if isinstance(model, Policy) else model)
        self.policy = model if isinstance(model, Policy) else Policy(model, vocab_size=vocab_size(tokenizer))
        self.policy.require_one_text("be a judge or a critic")
        self.tokenizer, self.form, self.name, self.most_reasons = tokenizer, form, name, most_reasons
        self.codec = codec(tokenizer)
        self.labels = NO_TIE if form.labels == PAIR.labels else form.labels
        self.limit = positions.limit(self.policy.model)
        """Tokens of the longest question and answer; None: there is no bound."""
        self._stated = positions.stated(self.policy.model.config)
        try:  # what cannot be written is said before anything is asked
            self._label_ids, self._common = self._encode_labels()
        except ValueError as error:
            raise ValueError(f"judge {name!r} cannot write its answers: {error}") from error
        self._question_ids(("",) * len(form.places))

    def answers(self, asked: Sequence[tuple[str, ...]]) -> list[Answered]:
        """See Answerer.

        Raises:
            ValueError: a question is longer than the model has positions.
        """
        questions = list(dict.fromkeys(asked))
        ids = [self._question_ids(texts) for texts in questions]
        chances: dict[tuple[str, ...], list[float]] = {}
        for rows in self._batches(ids):
            contexts = [ids[row] for row in rows]
            if self.form.cot:
                contexts = [a + b for a, b in zip(contexts, self._behind_reasons(contexts), strict=True)]
            chance_BK = self._label_chances([context + self._common for context in contexts])
            chances |= {questions[row]: chance_K for row, chance_K in zip(rows, chance_BK.tolist(), strict=True)}
        return [self._answered(chances[texts]) for texts in asked]

    def _answered(self, chance_K: Sequence[float]) -> Answered:
        best = max(chance_K)
        likely = [label for label, chance in zip(self.labels, chance_K, strict=True) if chance == best]
        label = "tie" if len(likely) > 1 and self.labels == NO_TIE else likely[0]
        return Answered(label, dict.fromkeys(self.form.labels, 0.0) | dict(zip(self.labels, chance_K, strict=True)))

    # -- tokens -------------------------------------------------------------------------------------------------------

    @property
    def _has_cue(self) -> bool:
        """Whether the label stands behind the cue, and not first in the reply."""
        return self.form.cot or not self.tokenizer.chat_template

    def _encode_labels(self) -> tuple[list[tuple[int, ...]], list[int]]:
        """The tokens of each label behind what they all begin with, and that."""
        space = " " if self._has_cue else ""
        ids = [self.codec.behind(space + label) for label in self.labels]
        common: list[int] = []
        while all(len(one) > len(common) + 1 for one in ids) and len({one[len(common)] for one in ids}) == 1:
            common.append(ids[0][len(common)])
        rest = [tuple(one[len(common) :]) for one in ids]
        if len(set(rest)) < len(rest):
            words = ", ".join(self.labels)
            raise ValueError(f"its tokenizer writes two of the labels {words} alike; name another model")
        return rest, common

    def _question_ids(self, texts: Sequence[str]) -> list[int]:
        question = fill_template(self.form.question, dict(zip(self.form.places, texts, strict=True)))
        try:
            if self.tokenizer.chat_template:
                ids = self.codec.chat(Chat([{"role": "user", "content": question}]))
            else:
                question += "\n\n" if self.form.cot else f"\n\n{self.form.cue}"
                # Without what some tokenizers put behind a text: the label is to follow.
                ids = self.codec.known(question, self.codec.places(question, begin=True).open())
        except ValueError as error:
            raise ValueError(f"judge {self.name!r} cannot read its question: {error}") from error
        reasons = self.most_reasons if self.form.cot else 0
        room = len(ids) + reasons + max(len(one) for one in self._label_ids) + len(self._common)
        if self.limit is not None and room > self.limit:
            raise ValueError(
                f"judge {self.name!r} has {self.limit:,} positions, and question and answer take {room:,} tokens: "
                "name another model, or a shorter template"
            )
        if self._stated is not None and room > self._stated:
            warnings.warn(
                f"judge {self.name!r} was made for {self._stated:,} tokens, and question and answer take {room:,}",
                LongQuestionWarning,
                stacklevel=2,
            )
            self._stated = None  # said once
        return ids

    def _batches(self, ids: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Places of questions, the longest first, in batches that the memory has room for."""
        batch: list[int] = []
        for place in sorted(range(len(ids)), key=lambda place: -len(ids[place])):
            if batch and len(ids[batch[0]]) * (len(batch) + 1) > MAX_BATCH_TOKENS:
                yield batch
                batch = []
            batch.append(place)
        if batch:
            yield batch

    # -- passes -------------------------------------------------------------------------------------------------------

    def _next_logprobs(self, contexts: Sequence[Sequence[int]]) -> Tensor:
        """log p of the next token, float64 [B, V] on the CPU."""
        input_BL, mask_BL = pad(contexts, "left")
        device = self.policy.device
        return self.policy.next_logprobs(input_BL.to(device), mask_BL.to(device)).double().cpu()

    def _label_chances(self, contexts: Sequence[list[int]]) -> Tensor:
        """P(label) of every label, float64 [B, K]; see the head of this file."""
        beginnings = sorted({ids[:size] for ids in self._label_ids for size in range(len(ids))}, key=len)
        logp_BV = {begin: self._next_logprobs([[*ids, *begin] for ids in contexts]) for begin in beginnings}
        columns = [
            torch.stack([logp_BV[ids[:n]][:, token] for n, token in enumerate(ids)]).sum(0) for ids in self._label_ids
        ]
        logp_BK = torch.stack(columns, 1)
        # Shifted before exp: the labels of a model that would say something else are all very unlikely.
        mass_BK = (logp_BK - logp_BK.amax(1, keepdim=True)).exp()
        own_BK = mass_BK.clone()
        for short, ids in enumerate(self._label_ids):
            for longer, more in enumerate(self._label_ids):
                if len(more) > len(ids) and more[: len(ids)] == ids:
                    own_BK[:, short] -= mass_BK[:, longer]
        own_BK = own_BK.clamp(min=0)  # the difference of nearly equal numbers may be a little below
        return own_BK / own_BK.sum(1, keepdim=True)

    def _behind_reasons(self, contexts: Sequence[list[int]]) -> list[list[int]]:
        """The tokens of each context's greedy reasons and of the line that its label follows."""
        ids: list[list[int]] = [[] for _ in contexts]
        open_rows = set(range(len(contexts)))
        outer, self.policy.steps = self.policy.steps, self.policy.trunk.steps()
        try:
            for _ in range(self.most_reasons):
                # Rows that have ended grow too: only what grows by a token is not computed again.
                logp_BV = self._next_logprobs([[*context, *own] for context, own in zip(contexts, ids, strict=True)])
                for row, token in enumerate(logp_BV.argmax(1).tolist()):
                    ids[row].append(token)
                    # The model's own verdict is cut off below: its probability is what is asked for.
                    if token in self.codec.control or self._line in self.codec.decode(ids[row][-16:]):
                        open_rows.discard(row)
                if not open_rows:
                    break
        finally:
            self.policy.steps = outer
        return [self.codec.behind(f"{self._reasons(own)}{self._line}", unknown="skip") for own in ids]

    @property
    def _line(self) -> str:
        return f"\n{self.form.cue}"

    def _reasons(self, ids: Sequence[int]) -> str:
        """The text of reasons, up to the first end or verdict."""
        end = next((n for n, token in enumerate(ids) if token in self.codec.control), len(ids))
        return self.codec.decode(ids[:end]).partition(self._line)[0].strip()


def load_local(
    spec: str | None, form: Form, *, task: object = None, device: str | torch.device = "cpu", most_reasons: int = 0
) -> LocalModel:
    """A model of this machine as a judge.

    Args:
        spec: a folder (of a saved agent too), a Hub id or smollm2-135m; None: the task's initial policy.
        form: of the questions, as `asking.shaped` gives it.
        task: whose model it is, where none is named.
        most_reasons: tokens of reasons; 0: 256.

    Raises:
        ValueError: nothing can be loaded, or the model cannot read the question.
    """
    place = loading.resolve_device(device)
    owner = task if isinstance(task, ModelOwner) else None
    if spec is None and owner is None:
        raise ValueError("judge 'local' is the task's own model, and no task is known: name one as local:FOLDER")
    if owner is not None:
        model, tokenizer = owner.load_model(spec, device=place), owner.load_tokenizer(spec)
    else:
        assert spec is not None
        model, tokenizer = loading.load_model(spec, device=place), loading.load_tokenizer(spec)
    name = LOCAL if spec is None else f"{LOCAL}:{spec}"
    return LocalModel(model, tokenizer, form, name, most_reasons or MOST_REASONS)
