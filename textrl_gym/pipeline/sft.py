"""Supervised fine-tuning: a language model learns prompt + completion pairs, from scratch or from a given model.

From scratch a copying curriculum comes first: without it a model of a few million parameters forms no induction heads
and never learns to take a name or an amount out of a post (measured: coverage stays at chance).

Shape legend: B rows, K completions a row, T places a completion, S = K T + 1, N tokens of completions, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, cast

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from textrl_gym import files, processes
from textrl_gym.bounds import MOST_ROWS, Seed, check_settings
from textrl_gym.core import PromptSource, Row
from textrl_gym.data.encoding import Chat, codec, encode_completions, end_ids, prompt_of
from textrl_gym.data.turn_markers import TurnMarkers, markers_of_template
from textrl_gym.mdp import budgets
from textrl_gym.mdp.env_settings import EnvSettings
from textrl_gym.mdp.task import PromptReader, Task, checked_rows
from textrl_gym.models import loading, positions, tiny
from textrl_gym.models.loading import declared_ends
from textrl_gym.models.packing import Dialogue, Item, Packed, Paired, batch, learnt_tokens, split
from textrl_gym.models.tokenizer import train_tokenizer, vocab_size
from textrl_gym.persistence import run_lock
from textrl_gym.persistence.save_schedule import SaveOptions
from textrl_gym.pipeline import induction
from textrl_gym.pipeline.optim import FineTuning, TunedModel, cosine
from textrl_gym.pipeline.trainer import MODEL, Phase, Trainer, finished_record, restore_random, settings_of, write_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


LEARNT = ("completion", "completions", "turns")
"""Columns that hold what is learnt, one of which a row must have."""
RECORD = "sft.json"
"""Settings and measurements, in the folder of a trained model."""


@dataclasses.dataclass(frozen=True)
class SFTConfig(FineTuning):
    """Settings of supervised fine-tuning. Budgets are in steps, never in seconds, so that a run can be repeated."""

    model: str | None = None
    """The causal LM or encoder-decoder to start from (Hub id, folder); None: a new Llama, and a new tokenizer that is
    trained on the rows (or the one of --env.tokenizer)."""
    steps: Annotated[int, Ge(1)] = 1500
    """Updates of supervised training, of rows that are drawn with repetition."""
    epochs: Annotated[float | None, Gt(0)] = None
    """Passes over the rows, each of which comes once in a pass; None: so many steps instead."""
    batch_size: Annotated[int, Ge(1), Le(MOST_ROWS)] = 12
    """Rows of an update."""
    learning_rate: Annotated[float, Gt(0)] = 2e-3
    """Peak learning rate of AdamW: linear warm-up, then a cosine to a twentieth. 2e-3 suits models of a few million
    parameters; those of 100M and more want 1e-5 to 5e-5 when all of it is trained, 1e-4 to 3e-4 by a LoRA."""
    warmup_steps: Annotated[int, Ge(0)] = 50
    """Updates until the peak learning rate."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """AdamW's weight decay."""
    max_grad_norm: Annotated[float, Gt(0)] = 1.0
    """Gradients are scaled down to at most this global norm."""
    copy_steps: Annotated[int, Ge(0)] = 600
    """At most so many updates of the copying curriculum (new models only)."""
    copy_loss: Annotated[float, Ge(0)] = 0.1
    """The curriculum ends early when the copying loss of its longest runs is below this, in nats a token."""
    copy_run: Annotated[int, Ge(1)] = 64
    """Longest random run of tokens to copy."""
    copy_batch_size: Annotated[int, Ge(1), Le(MOST_ROWS)] = 12
    """Sequences of an update of the curriculum."""
    vocab_size: Annotated[int, Ge(258)] = 2048
    """Tokens of a new tokenizer."""
    hidden_size: Annotated[int, Ge(1)] = 128
    """Width of a new model."""
    intermediate_size: Annotated[int, Ge(1)] = 384
    """Width of a new model's feed-forward layers."""
    layers: Annotated[int, Ge(2)] = 4
    """Layers of a new model: copying takes two."""
    heads: Annotated[int, Ge(1)] = 2
    """Attention heads of a new model."""
    eval_rows: Annotated[int, Ge(1)] = 256
    """Held-out rows for the loss."""
    seed: Seed = 0
    """Seeds the weights, the order of rows and the copied runs."""

    def __post_init__(self) -> None:
        check_settings(self)
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size={self.hidden_size} is no multiple of heads={self.heads}")
        if self.lora_rank and self.model is None:
            raise ValueError(f"lora_rank={self.lora_rank} needs a model to start from: give model")

    def updates(self, rows: int) -> int:
        """Of supervised training on so many rows."""
        return self.steps if self.epochs is None else max(1, round(self.epochs * rows / self.batch_size))


# -- loss -------------------------------------------------------------------------------------------------------------


def completion_nll(model: PreTrainedModel, batch: Packed | Paired) -> tuple[Tensor, Tensor]:
    """Summed -log p of the completions' tokens (EOS included, prompts not) in float32, and how many they are."""
    logits_NV, token_N = batch.learnt(model)
    return F.cross_entropy(logits_NV.float(), token_N, reduction="sum"), batch.count


def sft_loss(model: PreTrainedModel, batch: Packed | Paired) -> Tensor:
    """Mean -log p over all completion tokens of the batch: long and short rows' tokens weigh the same."""
    nll, count = completion_nll(model, batch)
    return nll / count


# -- rows -------------------------------------------------------------------------------------------------------------


def encode_row(
    task: Task, tokenizer: PreTrainedTokenizerBase, row: Row, ends: Sequence[int] = ()
) -> tuple[list[int], list[list[int]]]:
    """Token ids of a row's prompt (cut to the task's limit) and of its completions, each with one EOS.

    A completion longer than the budget loses its end and its EOS: the model must not learn to stop in mid-sentence.
    Where the task is a conversation and the row has a column `turns`, that is learnt (`encode_dialogue`).

    Args:
        ends: tokens that end a completion, the usual one first; none: the tokenizer's EOS.
    """
    if task.replies_to_turns and row.get("turns"):
        return task.encode(row, tokenizer, task.max_prompt_tokens), [encode_dialogue(task, tokenizer, row, ends)]
    texts = row.get("completions") or [row["completion"]]
    completions = encode_completions(prompt_of(row), texts, tokenizer, task.max_new_tokens, end_ids=ends)
    return task.encode(row, tokenizer, task.max_prompt_tokens), completions


def encode_dialogue(task: Task, tokenizer: PreTrainedTokenizerBase, row: Row, ends: Sequence[int] = ()) -> Dialogue:
    """The turns of a row as the environment appends them behind the prompt; the agent's are what is learnt.

    Args:
        row: with `turns`, [{"role": "assistant", "content": ...}, {"role": "user", ...}, ...], the agent's first.
        ends: as of `encode_row`.

    Raises:
        ValueError: turns that do not alternate, or a word without a token.
    """
    turns = row["turns"][: len(row["turns"]) - (len(row["turns"]) + 1) % 2]  # nobody acts on a last reply
    spoken = isinstance(row.get("chat"), Chat)
    markers = markers_of_template(tokenizer) if spoken else TurnMarkers(tokenizer, *task.turn_markers)
    end = markers.end_id if markers.end_id is not None else next(iter(ends), tokenizer.eos_token_id)
    ids: list[int] = []
    actions: list[bool] = []
    for number, turn in enumerate(turns):
        role = ("assistant", "user")[number % 2]
        if turn["role"] != role:
            raise ValueError(f"turn {number} of a dialogue must be of the role {role!r}, got {turn['role']!r}")
        if role == "user":
            new = markers.encode(turn["content"], ids[-1])
        elif number == 0 and not spoken:
            (new,) = encode_completions(row["prompt"], [turn["content"]], tokenizer, end_ids=[end])
        else:
            new = [*codec(tokenizer).behind(turn["content"]), end]
        ids += new
        actions += [role == "assistant"] * len(new)
    return Dialogue(ids[: task.max_new_tokens], actions[: task.max_new_tokens])


class OneCompletion:
    """The rows of a dataset without a column `completions`, which only a task's own rows have."""

    def __init__(self, source: PromptSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int, /) -> Row:
        return {name: value for name, value in self.source[index].items() if name != "completions"}


def demonstrations(task: Task, split: str, env: EnvSettings, reader: PromptReader | None = None) -> PromptSource:
    """Rows to learn from: the task's own `demonstrations(split)` where it has them, or the rows of a dataset.

    A row holds `prompt` and `completion`, or a list of `completions`, which cost little more to learn than one. In a
    dataset a column called `completions` is anything, and not what is learnt. Of a task that is a conversation a row
    may hold `turns` instead.

    Args:
        reader: of the model that is to learn.

    Raises:
        ValueError: the rows have no completions to learn, or bad ones.
    """
    # A task's own demonstrations may be poor on purpose, as those of TLDRSummarize-v0 are.
    own: Callable[[str], PromptSource] | None = getattr(task, "demonstrations", None)
    rows = functools.partial(checked_rows, task, split, env.dataset, env.bad_rows, reader)
    if env.dataset is not None:
        source: PromptSource = OneCompletion(rows())
    else:
        source = rows() if own is None else own(split)
    if len(source) == 0 or not any(source[0].get(name) for name in LEARNT):
        columns = sorted(source[0]) if len(source) else "no rows"
        raise ValueError(f"supervised training needs rows with the columns prompt and completion; found {columns}")
    return source


class Batches:
    """Endless shuffled batches, each of rows with prompts of about one length, so that little is padding."""

    def __init__(
        self,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        source: PromptSource,
        batch_size: int,
        seed: int,
        pool: int = 8,
        ends: Sequence[int] = (),
        once: bool = False,
    ) -> None:
        """pool: so many batches are drawn together; ends: as of `encode_row`; once: each row comes once in a pass."""
        self.task, self.tokenizer, self.source, self.ends = task, tokenizer, source, ends
        self.batch_size, self.pool, self.seed, self.once = batch_size, pool, seed, once
        self.rng = random.Random(seed)
        self._before: tuple[Any, int] = (None, 0)
        self._number = 0
        """Rows drawn so far."""
        self._order: tuple[int, list[int]] = (-1, [])
        """A pass, and the order of its rows."""
        self._drawn: list[list[Item]] = []

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[Item]:
        """The next batch."""
        if not self._drawn:
            self._draw()
        return self._drawn.pop(0)

    def _place(self) -> int:
        """The place of the next row in the source."""
        if not self.once:
            return self.rng.randrange(len(self.source))
        number, self._number = self._number, self._number + 1
        turn, place = divmod(number, len(self.source))
        if self._order[0] != turn:
            # By the number of the pass alone: a run that goes on in its middle has the same order.
            self._order = turn, random.Random(f"{self.seed} {turn}").sample(range(len(self.source)), len(self.source))
        return self._order[1][place]

    def _draw(self) -> None:
        self._before = self.rng.getstate(), self._number
        # Eight batches are drawn together and sorted: similar lengths within a batch, a random order of batches.
        picked = [self.source[self._place()] for _ in range(self.batch_size * self.pool)]
        pairs = [encode_row(self.task, self.tokenizer, row, self.ends) for row in picked]
        pairs.sort(key=lambda pair: len(pair[0]))
        chunks = [pairs[i : i + self.batch_size] for i in range(0, len(pairs), self.batch_size)]
        self.rng.shuffle(chunks)
        self._drawn = chunks

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON can hold it: before the pool, and how many of its batches are left."""
        rng, number = self._before
        return {"rng": rng, "number": number, "left": len(self._drawn), "rows": len(self.source)}

    def go_to(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`.

        Raises:
            ValueError: there are not as many rows as there were.
        """
        if state["rows"] != len(self.source):
            raise ValueError(f"the run was started on {state['rows']:,} rows, and there are {len(self.source):,} now")
        restore_random(self.rng, state["rng"])
        self._number = state["number"]
        self._draw()
        self._drawn = self._drawn[len(self._drawn) - state["left"] :]


# -- training ---------------------------------------------------------------------------------------------------------


def new_model(config: SFTConfig, tokenizer: PreTrainedTokenizerBase, places: int) -> LlamaForCausalLM:
    """A new Llama with an induction circuit (`pipeline.induction`)."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            attention_bias=True,
            max_position_embeddings=max(512, places),
            tie_word_embeddings=True,  # else a quarter of the parameters would be a second embedding
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    induction.induction_init(model, torch.Generator().manual_seed(config.seed))
    return model


class Supervised(Phase):
    """Updates on prompt + completion pairs."""

    name = "supervised"
    tuned: TunedModel

    def __init__(
        self, tuned: TunedModel, batches: Batches, config: SFTConfig, measure: Callable[[], dict[str, float]]
    ) -> None:
        """measure: gives the losses on held-out rows."""
        super().__init__(config.updates(len(batches.source)), config.max_grad_norm, config.weight_decay)
        self.tuned, self.batches, self.config, self.measure = tuned, batches, config, measure

    def losses(self, step: int) -> Iterator[Tensor]:
        items = next(self.batches)
        parts = split(items, self.config.micro_batch_tokens, multiple_of=processes.size())
        tokens = sum(sum(learnt_tokens(ids)) for _, completions in items for ids in completions)
        for part, weight in self.tuned.deal(parts):
            some = batch([items[number] for number in part], self.tuned.model)
            nll, _ = self.tuned.run(functools.partial(completion_nll, batch=some))
            yield nll * weight / tokens

    def learning_rate(self, step: int) -> float:
        return self.config.learning_rate * cosine(step, self.steps, self.config.warmup_steps)

    def state(self) -> dict[str, Any]:
        return self.batches.state()

    def go_to(self, step: int, state: Mapping[str, Any]) -> None:
        if state:
            self.batches.go_to(state)

    def heldout(self, updates: int) -> dict[str, float]:
        every = self.config.eval_every
        if not every or updates % every or updates >= self.steps:
            return {}
        self.tuned.gather()
        return self.measure()

    def measured(self, steps: int, mean_loss: float) -> dict[str, float]:
        return {"train_loss": mean_loss}


@torch.no_grad()
def heldout_losses(
    tuned: TunedModel, task: Task, tokenizer: PreTrainedTokenizerBase, source: PromptSource, rows: int
) -> dict[str, float]:
    """Nats a completion token over the first `rows` rows, and by their column `subset` where they have one."""
    ends = end_ids(tokenizer, declared_ends(tuned.model))
    by_subset: dict[str, list[Item]] = {}
    for number in range(min(rows, len(source))):
        row = source[number]
        by_subset.setdefault(str(row.get("subset") or ""), []).append(encode_row(task, tokenizer, row, ends))
    totals: dict[str, tuple[float, int]] = {}
    for subset, items in by_subset.items():
        total, count = 0.0, 0
        for part in split(items, tuned.config.micro_batch_tokens):
            with tuned.precision():
                nll, tokens = completion_nll(tuned.model, batch([items[number] for number in part], tuned.model))
            total, count = total + nll.item(), count + int(tokens)
        totals[subset] = total, count
    everything = sum(total for total, _ in totals.values()) / sum(count for _, count in totals.values())
    of_subsets = {f"heldout_loss/{subset}": total / count for subset, (total, count) in totals.items() if subset}
    return {"heldout_loss": everything, **of_subsets}


def load_initial(
    task: Task, config: SFTConfig, source: PromptSource, tokenizer_name: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer that training starts from."""
    if config.model is not None:
        model = cast("PreTrainedModel", task.load_model(config.model))
        if task.replies_to_turns and model.config.is_encoder_decoder:
            raise ValueError(f"{type(model).__name__} is an encoder-decoder, which cannot learn conversations here yet")
        positions.check(model, positions.limit(model), task.max_prompt_tokens, task.max_new_tokens)
        return model, task.load_tokenizer(tokenizer_name or config.model)
    if tokenizer_name is not None:
        tokenizer = task.load_tokenizer(tokenizer_name)
        return new_model(config, tokenizer, task.max_prompt_tokens + task.max_new_tokens), tokenizer
    if task.symbols:
        tokenizer = tiny.symbol_tokenizer(task.symbols)
        return new_model(config, tokenizer, task.max_prompt_tokens + task.max_new_tokens), tokenizer
    picked = random.Random(config.seed).choices(range(len(source)), k=min(4000, len(source)))
    texts = (source[i]["prompt"] + source[i]["completion"] for i in picked)
    # 4,000 texts are enough for a vocabulary of this size, and reading 60,000 is slow.
    tokenizer = train_tokenizer(texts, config.vocab_size)
    return new_model(config, tokenizer, task.max_prompt_tokens + task.max_new_tokens), tokenizer


def sft(
    env_id: str,
    config: SFTConfig,
    out: str | Path,
    env: EnvSettings | None = None,
    save: SaveOptions | None = None,
) -> dict[str, Any]:
    """Train on the rows of a task and save the model, its tokenizer and `sft.json` (settings and measurements).

    The same call goes on where one was stopped, and returns the record of one that has ended.

    Args:
        env_id: a registered environment, whose task says how prompts are cut and how long completions may be.
        out: the folder to write; it can be given to agents as `model`.
        env: the rows (dataset and split; held-out ones are those of "validation") and the budgets, where they are not
            the task's own.
        save: when checkpoints are written.

    Returns:
        What is in sft.json.

    Raises:
        ValueError: an unknown environment, or rows without completions; or the folder holds a training of other
            settings, or another process trains in it.
    """
    out, env, save = Path(out), env or EnvSettings(), save or SaveOptions()
    settings = settings_of(env_id, env, config)
    task = env.task(env_id)
    with run_lock.alone(out):
        record = finished_record(out, RECORD, env_id, env, config)
        if record is not None:
            return record
        files.check_free(out, "sft")
        rows, _ = (demonstrations(task, split, env) for split in (env.split, "validation"))
        with Trainer(out, settings, save) as trainer:
            write_run(out, "sft", settings, save)
            model, tokenizer, measured = _train(task, rows, config, env, trainer)
        record = {"environment": env_id, "env": dataclasses.asdict(env), "config": dataclasses.asdict(config)}
        text = json.dumps(record | {"measured": measured}, indent=2)

        def fill(folder: Path) -> None:
            save_model(model, tokenizer, folder)
            (folder / RECORD).write_text(text + "\n", encoding="utf-8")

        files.write_folder(out, fill)
        trainer.finish()
        return json.loads(text)


def _train(
    task: Task, rows: PromptSource, config: SFTConfig, env: EnvSettings, trainer: Trainer
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]:
    """The trained model, its tokenizer and what was measured, from the start or from the trainer's checkpoint."""
    torch.manual_seed(config.seed)
    if trainer.source is None:
        model, tokenizer = load_initial(task, config, rows, env.tokenizer)
    else:
        saved = str(trainer.source / MODEL)
        # A checkpoint of a LoRA has what is trained alone.
        whole = str(config.model) if config.lora_rank else saved
        model, tokenizer = cast("PreTrainedModel", task.load_model(whole)), task.load_tokenizer(saved)
    tuned = TunedModel(model, config, config.seed)
    if trainer.source is not None and config.lora_rank:
        tuned.load_adapter(trainer.source / MODEL)
    reader = PromptReader(task, tokenizer, task.max_prompt_tokens, env.chat_settings())
    source, heldout = (demonstrations(task, split, env, reader) for split in (env.split, "validation"))
    ends = end_ids(tokenizer, declared_ends(model))
    lengths = budgets.told_of_splits({env.split: source, "validation": heldout}, task, tokenizer, ends)
    phases: list[Phase] = []
    if config.model is None and config.copy_steps:
        phases.append(
            induction.CopyCurriculum(
                model,
                steps=config.copy_steps,
                target_loss=config.copy_loss,
                longest_run=config.copy_run,
                batch_size=config.copy_batch_size,
                rate=config.learning_rate,
                seed=config.seed,
            )
        )
    stream = Batches(task, tokenizer, source, config.batch_size, config.seed, ends=ends, once=config.epochs is not None)
    measure = functools.partial(heldout_losses, tuned, task, tokenizer, heldout, config.eval_rows)
    phases.append(Supervised(tuned, stream, config, measure))

    def save(folder: Path) -> None:
        tuned.save(folder / MODEL)
        tokenizer.save_pretrained(folder / MODEL)

    measured = trainer.train(tuned.model, phases, save) | measure()
    merged = tuned.merged()
    record = {"parameters": sum(p.numel() for p in merged.parameters()), **measured, "lengths": lengths}
    return merged, tokenizer, record


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Safetensors, config and tokenizer in one folder that transformers can load."""
    folder.mkdir(parents=True, exist_ok=True)
    with loading.no_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
