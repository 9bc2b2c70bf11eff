"""knowledge_margin: how much a sentence of knowledge helps a frozen question-answering model.

    r = (tanh(m(q, k)) - tanh(m(q))) / 2,     m = s(a* | ...) - max over a' != a* of s(a' | ...)

(Liu et al. 2022, "Rainier: reinforced knowledge introspector", arXiv:2210.03078, section 2.2), where s is the mean
log-probability of an answer's tokens behind the question, with the knowledge k or without it, and a* is the right
choice. Departures: Rainier scales rewards to mean 0 and standard deviation 1 of its initial policy, and its model is an
encoder-decoder; here any causal LM of transformers reads "question Knowledge : sentence Answer :".

    knowledge_margin                 the task's own question-answering model
    knowledge_margin:NAME            another of the task's, a folder beside its own
    knowledge_margin:FOLDER          any causal LM: a folder or a Hub id

Rows have `options`, the choices as texts, and `answer`, the index of the right one.

Shape legend: B rows, N choices of all rows, S places, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from textrl_gym.bounds import shown
from textrl_gym.data.encoding import codec
from textrl_gym.models import loading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER = " Answer :"
"""What stands before an answer."""
BATCH = 512
"""Choices of one pass."""


class KnowledgeMargin:
    """Rewards of sentences of knowledge by one reader; a callable of TRL's signature."""

    def __init__(self, source: str, *, keep_suffix: str = "", device: str | torch.device = "cpu") -> None:
        """Raises nothing yet: the model is loaded at the first score, since making an environment must not wait.

        Args:
            source: a folder or Hub id of a causal LM with its tokenizer.
            keep_suffix: the end of every prompt, which asks for knowledge and is no part of the question.
            device: where the model runs.
        """
        self.source, self.keep_suffix, self.device = source, keep_suffix, device
        self._loaded: tuple[nn.Module, PreTrainedTokenizerBase] | None = None

    @property
    def loaded(self) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        """The reader, a causal LM, and its tokenizer.

        Raises:
            ValueError: none can be loaded.
        """
        if self._loaded is None:
            model = loading.load_model(self.source, device=self.device)
            self._loaded = model, loading.load_tokenizer(self.source)
        return self._loaded

    def scoring_models(self) -> list[nn.Module]:
        """The reader."""
        return [self.loaded[0]]

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        options: Sequence[Sequence[str]] | None = None,
        answer: Sequence[int] | None = None,
        **columns: object,
    ) -> Tensor:
        """Rewards in [-1, 1], float32 [B] on the CPU.

        Raises:
            ValueError: rows without `options` or `answer`, or whose answer is none of the options.
        """
        if options is None or answer is None:
            raise ValueError(f"knowledge_margin needs the columns options and answer; the rows have {sorted(columns)}")
        with_B = self.margins(prompts, completions, options, answer)
        # A group's rows have one question, which is answered once without knowledge.
        keys = [(prompt, tuple(of_row), right) for prompt, of_row, right in zip(prompts, options, answer, strict=True)]
        unique = list(dict.fromkeys(keys))
        alone = self.margins([p for p, _, _ in unique], None, [o for _, o, _ in unique], [a for _, _, a in unique])
        without = dict(zip(unique, alone.tolist(), strict=True))
        without_B = torch.tensor([without[key] for key in keys])
        return (with_B.tanh() - without_B.tanh()) / 2

    def margins(
        self,
        prompts: Sequence[str],
        completions: Sequence[str] | None,
        options: Sequence[Sequence[str]],
        answer: Sequence[int],
    ) -> Tensor:
        """m of each row: by how much the right answer is likelier than the best wrong one, in nats, float32 [B].

        Args:
            completions: the knowledge; None: there is none.

        Raises:
            ValueError: a row whose answer is none of at least two options.
        """
        for row, (choices, right) in enumerate(zip(options, answer, strict=True)):
            if len(choices) < 2 or isinstance(right, bool) or right not in range(len(choices)):
                raise ValueError(
                    f"row {row}: answer {shown(right)} is the index of none of its options {shown(choices)}"
                )
        texts = [prompt.removesuffix(self.keep_suffix) for prompt in prompts]
        if completions is not None:
            # Decoded completions may have lost their blank, and "Knowledge :the" would be other words.
            texts = [f"{prompt.rstrip()} {text.strip()}" for prompt, text in zip(prompts, completions, strict=True)]
        scores = iter(self._scores([text + ANSWER for text in texts], options))
        margins = []
        for choices, right in zip(options, answer, strict=True):
            score = list(itertools.islice(scores, len(choices)))
            margins.append(score[right] - max(score[:right] + score[right + 1 :]))
        return torch.tensor(margins, dtype=torch.float32)

    @torch.inference_mode()
    def _scores(self, texts: Sequence[str], options: Sequence[Sequence[str]]) -> list[float]:
        """s of every choice of every row, one behind the other."""
        model, tokenizer = self.loaded
        # A policy may write what the reader's tokenizer has no token for, which is then not read.
        text_codec = codec(tokenizer)
        read = [text_codec.encode(text, begin=True, unknown="skip") for text in texts]
        pairs = [
            (ids, text_codec.behind(f" {choice}", unknown="skip"))
            for ids, choices in zip(read, options, strict=True)
            for choice in choices
        ]
        for _, choice_ids in pairs:
            if not choice_ids:
                raise ValueError(f"the tokenizer of {self.source!r} has no tokens for one of the options {options[0]}")
        # Of similar lengths, so that little is padding.
        order = sorted(range(len(pairs)), key=lambda number: len(pairs[number][0]) + len(pairs[number][1]))
        score_N = torch.empty(len(pairs))
        for start in range(0, len(order), BATCH):
            places = order[start : start + BATCH]
            score_N[places] = _mean_logprobs(model, [pairs[place] for place in places])
        return score_N.tolist()


def _mean_logprobs(model: nn.Module, pairs: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    """Mean log-probability of the second part's tokens behind the first, float32 [N] on the CPU."""
    longest = max(len(text) + len(choice) for text, choice in pairs)
    # Padding stands on the right, where nothing that is read depends on it.
    ids_NS = torch.tensor([text + choice + [0] * (longest - len(text) - len(choice)) for text, choice in pairs])
    scored_NS = torch.zeros_like(ids_NS, dtype=torch.bool)
    for row, (text, choice) in enumerate(pairs):
        scored_NS[row, len(text) : len(text) + len(choice)] = True
    device = next(model.parameters()).device
    logits_NSV = model(input_ids=ids_NS.to(device), use_cache=False).logits[:, :-1]
    logp_NS = logits_NSV.float().log_softmax(-1).gather(2, ids_NS[:, 1:, None].to(device))[..., 0].cpu()
    mask_NS = scored_NS[:, 1:]
    return (logp_NS * mask_NS).sum(1) / mask_NS.sum(1)


def make(argument: str | None, *, task: object, device: str | torch.device) -> KnowledgeMargin:
    """The reward by the task's own question-answering model, by another of the task's, or by any causal LM.

    Raises:
        ValueError: the task has no such model of its own, and none is named.
    """
    own = getattr(task, "reader_path", None)
    source = argument or own
    if argument and own and not Path(argument).expanduser().is_dir():
        beside = Path(own).parent / argument
        source = str(beside) if beside.is_dir() else argument
    if not source:
        raise ValueError(
            f"task {type(task).__name__} has no question-answering model of its own: name one as "
            "knowledge_margin:FOLDER (or a Hub id), or choose another reward"
        )
    return KnowledgeMargin(source, keep_suffix=getattr(task, "keep_suffix", ""), device=device)
