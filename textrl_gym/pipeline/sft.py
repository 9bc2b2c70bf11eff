"""Supervised fine-tuning: a causal LM learns prompt + completion pairs, from scratch or from a given model.

From scratch a copying curriculum comes first: without it a model of a few million parameters forms no induction heads
and never learns to take a name or an amount out of a post (measured: coverage stays at chance).

Shape legend: B rows, K completions a row, T places a completion, S = K T + 1, N tokens of completions, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from textrl_gym import files
from textrl_gym.bounds import check_settings
from textrl_gym.core import PromptSource, Row
from textrl_gym.mdp.env_settings import EnvSettings
from textrl_gym.mdp.task import Task
from textrl_gym.models.packing import Packed, pack
from textrl_gym.models.tokenizer import train_tokenizer
from textrl_gym.pipeline import induction
from textrl_gym.pipeline.optim import RunningMean, adamw, cosine, descend, progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """Settings of supervised fine-tuning. Budgets are in steps, never in seconds, so that a run can be repeated."""

    model: str | None = None
    """The causal LM to start from (Hub id, folder); None: a new Llama, and a new tokenizer that is trained on the rows
    (or the one of --env.tokenizer)."""
    steps: Annotated[int, Ge(1)] = 1500
    """Updates of supervised training."""
    batch_size: Annotated[int, Ge(1)] = 12
    """Rows of an update."""
    learning_rate: Annotated[float, Gt(0)] = 2e-3
    """Peak learning rate of AdamW: linear warm-up, then a cosine to a twentieth."""
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
    copy_batch_size: Annotated[int, Ge(1)] = 12
    """Sequences of an update of the curriculum."""
    vocab_size: Annotated[int, Ge(258)] = 2048
    """Tokens of a new tokenizer."""
    hidden_size: Annotated[int, Ge(1)] = 128
    """Width of a new model."""
    intermediate_size: Annotated[int, Ge(1)] = 384
    """Width of a new model's feed-forward layers."""
    layers: Annotated[int, Ge(1)] = 4
    """Layers of a new model."""
    heads: Annotated[int, Ge(1)] = 2
    """Attention heads of a new model."""
    eval_rows: Annotated[int, Ge(1)] = 256
    """Held-out rows for the loss."""
    seed: int = 0
    """Seeds the weights, the order of rows and the copied runs."""

    def __post_init__(self) -> None:
        check_settings(self)
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size={self.hidden_size} is no multiple of heads={self.heads}")


# -- loss -------------------------------------------------------------------------------------------------------------


def completion_nll(model: PreTrainedModel, batch: Packed) -> tuple[Tensor, Tensor]:
    """Summed -log p of the completions' tokens (EOS included, prompts not) in float32, and how many they are."""
    rows, most, width = batch.token_BKT.shape
    # The prompt's last place predicts every first token; place t of a completion predicts its token t + 1.
    # The head is applied to completions only: prompts are most of the places and are not learnt.
    logits_BSV = model(**batch.inputs(model), logits_to_keep=most * width + 1).logits[:, -(most * width + 1) :]
    place_KT = torch.arange(most * width).view(most, width)
    place_KT[:, 0] = 0
    mask_BKT = batch.mask_BKT
    row_N = torch.arange(rows)[:, None, None].expand(mask_BKT.shape)[mask_BKT]
    logits_NV = logits_BSV[row_N, place_KT.expand(mask_BKT.shape)[mask_BKT]]
    nll = F.cross_entropy(logits_NV.float(), batch.token_BKT[mask_BKT].to(model.device), reduction="sum")
    return nll, mask_BKT.sum()


def sft_loss(model: PreTrainedModel, batch: Packed) -> Tensor:
    """Mean -log p over all completion tokens of the batch: long and short rows' tokens weigh the same."""
    nll, count = completion_nll(model, batch)
    return nll / count


# -- rows -------------------------------------------------------------------------------------------------------------


def encode_row(task: Task, tokenizer: PreTrainedTokenizerBase, row: Row) -> tuple[list[int], list[list[int]]]:
    """Token ids of a row's prompt (cut to the task's limit) and of its completions, each with one EOS.

    A completion longer than the budget loses its end and its EOS: the model must not learn to stop in mid-sentence.
    """
    texts = row.get("completions") or [row["completion"]]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    return task.encode(row, tokenizer, task.max_prompt_tokens), [some[: task.max_new_tokens] for some in ids]


def demonstrations(task: Task, split: str, dataset: str | None) -> PromptSource:
    """Rows to learn from: the task's own `demonstrations(split)` where it has them, or the rows of a dataset.

    A row holds `prompt` and `completion`, or a list of `completions`, which cost little more to learn than one.

    Raises:
        ValueError: the rows have no completions to learn.
    """
    # A task's own demonstrations may be poor on purpose, as those of TLDRSummarize-v0 are.
    own: Callable[[str], PromptSource] | None = getattr(task, "demonstrations", None)
    source = own(split) if dataset is None and own is not None else task.rows(split, dataset)
    if len(source) == 0 or not (source[0].get("completions") or source[0].get("completion")):
        columns = sorted(source[0]) if len(source) else "no rows"
        raise ValueError(f"supervised training needs rows with the columns prompt and completion; found {columns}")
    return source


def batches(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    source: PromptSource,
    batch_size: int,
    rng: random.Random,
    pool: int = 8,
) -> Iterator[Packed]:
    """Endless shuffled batches, each of rows with prompts of about one length, so that little is padding."""
    while True:
        # Eight batches are drawn together and sorted: similar lengths within a batch, a random order of batches.
        picked = [source[rng.randrange(len(source))] for _ in range(batch_size * pool)]
        pairs = [encode_row(task, tokenizer, row) for row in picked]
        pairs.sort(key=lambda pair: len(pair[0]))
        chunks = [pairs[i : i + batch_size] for i in range(0, len(pairs), batch_size)]
        rng.shuffle(chunks)
        yield from map(pack, chunks)


# -- training ---------------------------------------------------------------------------------------------------------


def new_model(config: SFTConfig, tokenizer: PreTrainedTokenizerBase, places: int) -> LlamaForCausalLM:
    """A new Llama with an induction circuit (`pipeline.induction`)."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
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


@torch.no_grad()
def heldout_loss(
    model: PreTrainedModel, task: Task, tokenizer: PreTrainedTokenizerBase, source: PromptSource, rows: int
) -> float:
    """Nats a completion token over the first `rows` rows."""
    total, count = 0.0, 0
    picked = [source[i] for i in range(min(rows, len(source)))]
    for start in range(0, len(picked), 32):
        batch = pack([encode_row(task, tokenizer, row) for row in picked[start : start + 32]])
        nll, tokens = completion_nll(model, batch)
        total, count = total + nll.item(), count + int(tokens)
    return total / count


def load_initial(
    task: Task, config: SFTConfig, source: PromptSource, tokenizer_name: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer that training starts from."""
    if config.model is not None:
        model = cast("PreTrainedModel", task.load_model(config.model))
        return model, task.load_tokenizer(tokenizer_name or config.model)
    if tokenizer_name is not None:
        tokenizer = task.load_tokenizer(tokenizer_name)
        return new_model(config, tokenizer, task.max_prompt_tokens + task.max_new_tokens), tokenizer
    picked = random.Random(config.seed).choices(range(len(source)), k=min(4000, len(source)))
    texts = (source[i]["prompt"] + source[i]["completion"] for i in picked)
    # 4,000 texts are enough for a vocabulary of this size, and reading 60,000 is slow.
    tokenizer = train_tokenizer(texts, config.vocab_size)
    return new_model(config, tokenizer, task.max_prompt_tokens + task.max_new_tokens), tokenizer


def sft(env_id: str, config: SFTConfig, out: str | Path, env: EnvSettings | None = None) -> dict[str, Any]:
    """Train on the rows of a task and save the model, its tokenizer and `sft.json` (settings and measurements).

    Args:
        env_id: a registered environment, whose task says how prompts are cut and how long completions may be.
        out: the folder to write; it can be given to agents as `model`.
        env: the rows (dataset and split; held-out ones are those of "validation") and the budgets, where they are not
            the task's own.

    Returns:
        What is in sft.json.

    Raises:
        ValueError: an unknown environment, or rows without completions.
    """
    out = Path(out)
    env = env or EnvSettings()
    task = env.task(env_id)
    torch.manual_seed(config.seed)
    source, heldout = (demonstrations(task, split, env.dataset) for split in (env.split, "validation"))
    model, tokenizer = load_initial(task, config, source, env.tokenizer)
    model.eval()  # no dropout: the same function is trained that will be sampled from
    measured: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}

    with progress_bar() as bar:
        if config.model is None and config.copy_steps:
            row = bar.add_task("copying", total=config.copy_steps, note="")
            measured |= induction.copy_curriculum(
                model,
                steps=config.copy_steps,
                target_loss=config.copy_loss,
                longest_run=config.copy_run,
                batch_size=config.copy_batch_size,
                learning_rate=config.learning_rate,
                generator=torch.Generator().manual_seed(config.seed),
                report=lambda loss: bar.update(row, advance=1, note=f"loss {loss:.3f}"),
            )
        rng = random.Random(config.seed)
        optimizer = adamw(model, config.learning_rate, config.weight_decay)
        stream = batches(task, tokenizer, source, config.batch_size, rng)
        row = bar.add_task("supervised", total=config.steps, note="")
        mean_loss = RunningMean()
        for step, batch in zip(range(config.steps), stream, strict=False):
            loss = sft_loss(model, batch)
            rate = config.learning_rate * cosine(step, config.steps, config.warmup_steps)
            descend(model, optimizer, loss, rate, config.max_grad_norm)
            bar.update(row, advance=1, note=f"loss {mean_loss.update(loss.item()):.3f}")
    measured |= {
        "train_loss": mean_loss.value,
        "heldout_loss": heldout_loss(model, task, tokenizer, heldout, config.eval_rows),
    }
    save_model(model, tokenizer, out)
    record = {"environment": env_id, "env": dataclasses.asdict(env), "config": dataclasses.asdict(config)}
    record["measured"] = measured
    files.write_text(out / "sft.json", json.dumps(record, indent=2) + "\n")
    return record


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Safetensors, config and tokenizer in one folder that transformers can load."""
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
