"""Supervised training: the loss counts completion tokens only, packing changes nothing, the seed decides everything."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from seq2seq_models import bart
from transformers import BartForConditionalGeneration

from textrl_gym import processes
from textrl_gym.envs.tldr_summarize import TLDRSummarize
from textrl_gym.mdp.env_settings import EnvSettings
from textrl_gym.models import loading, tiny
from textrl_gym.models.packing import Item, pack, split
from textrl_gym.models.tokenizer import EOS, train_tokenizer
from textrl_gym.pipeline import induction, optim, sft
from textrl_gym.pipeline.optim import TunedModel
from textrl_gym.pipeline.sft import SFTConfig

TEXTS = ["Anna broke my lamp on Monday. It cost me $450.", "Is it right to tell her?", "My boss Tom lost 2 keys."]
TINY = SFTConfig(
    steps=3, batch_size=2, copy_steps=2, copy_run=8, hidden_size=16, intermediate_size=32, layers=2, eval_rows=4
)


# -- tokenizer --------------------------------------------------------------------------------------------------------


@given(st.text(max_size=60))
def test_any_text_comes_back(text: str) -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    if EOS not in text:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_vocabulary_without_room_for_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size=100 is too small"):
        train_tokenizer(TEXTS, 100)


def test_values_of_the_embedded_world_are_a_few_tokens() -> None:
    task = TLDRSummarize()
    tokenizer = task.load_tokenizer()
    source = task.rows("validation")
    rows = [source[i] for i in range(100)]
    for kind, most in {"amount": 2, "feeling": 1, "when": 3}.items():
        assert max(len(tokenizer(" " + row["facts"][kind]["value"])["input_ids"]) for row in rows) <= most
    whole = [len(tokenizer(row["prompt"])["input_ids"]) <= task.max_prompt_tokens for row in rows]
    assert sum(whole) >= 98


# -- loss -------------------------------------------------------------------------------------------------------------


def alone(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """-log p of one completion by the plain forward pass, without any padding."""
    logits_LV = model(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
    return -torch.stack([logits_LV[at, token] for at, token in zip(places, completion, strict=True)])


@pytest.mark.parametrize("model", [tiny.llama(20, scale=0.3), tiny.gpt2(20, 32)], ids=["llama", "gpt2"])
def test_the_loss_is_the_mean_over_completion_tokens_only(model: Any) -> None:
    items = [([3, 4, 5, 6], [[7, 8, 0], [9, 0]]), ([2], [[1, 2, 3, 4, 0]])]
    expected = torch.cat([alone(model, prompt, text) for prompt, texts in items for text in texts])
    assert len(expected) == 3 + 2 + 5  # EOS (0) of each completion included, once
    loss = sft.sft_loss(model, pack(items))
    torch.testing.assert_close(loss, expected.mean(), atol=1e-5, rtol=0)


def test_eos_once_and_none_after_a_cut() -> None:
    task = TLDRSummarize()
    tokenizer = task.load_tokenizer()
    _, (short, long) = sft.encode_row(task, tokenizer, {"prompt": "a\n\nTL;DR:", "completions": [" b", " b" * 99]})
    assert short.count(tokenizer.eos_token_id) == 1
    assert short[-1] == tokenizer.eos_token_id
    assert len(long) == task.max_new_tokens
    assert tokenizer.eos_token_id not in long


def test_an_eos_in_the_data_is_the_one_eos() -> None:
    task = TLDRSummarize()
    tokenizer = task.load_tokenizer()
    texts = [" b c", f" b c{EOS}", f" b c{EOS}{EOS}\n", f" b{EOS} c"]
    prompt_ids, completions = sft.encode_row(task, tokenizer, {"prompt": f"a{EOS}\n\nTL;DR:", "completions": texts})
    assert tokenizer.eos_token_id not in prompt_ids
    assert completions[0] == completions[1] == completions[2] == [*tokenizer(" b c")["input_ids"], 0]
    assert tokenizer.decode(completions[3]) == f" b{EOS} c{EOS}"
    assert completions[3].count(0) == 1


# -- induction --------------------------------------------------------------------------------------------------------


def test_the_initialisation_attends_to_what_followed_this_token() -> None:
    config = SFTConfig(hidden_size=64, intermediate_size=64, heads=1)
    torch.manual_seed(0)  # of what the circuit leaves as it is
    model = sft.new_model(config, train_tokenizer(TEXTS, 300), 64)
    run_N = torch.randperm(290, generator=torch.Generator().manual_seed(0))[:12]
    logits_LV = model(input_ids=run_N.repeat(2)[None]).logits[0]
    # In the second run place 12 + i holds token i, so token i + 1 comes next.
    rank = [(logits_LV[12 + i] > logits_LV[12 + i, run_N[i + 1]]).sum().item() for i in range(11)]
    # Of 290 tokens: 21 to 31 over 20 seeds of the other weights, where a random start gives about 145.
    assert sum(rank) / len(rank) < 45


def test_the_curriculum_lowers_the_copying_loss() -> None:
    config = SFTConfig(hidden_size=64, intermediate_size=64)
    model = sft.new_model(config, train_tokenizer(TEXTS, 300), 64)
    curriculum = induction.CopyCurriculum(
        model, steps=60, target_loss=0.0, longest_run=8, batch_size=16, rate=3e-3, seed=0
    )
    optimizer = optim.adamw(model, 3e-3)
    losses = [optim.descend(model, optimizer, curriculum.losses(n), curriculum.learning_rate(n))[0] for n in range(60)]
    first, *_, last = losses
    assert first is not None and last is not None and last < 0.5 * first


def test_the_curriculum_goes_on_to_the_longest_runs_and_ends_there() -> None:
    model = sft.new_model(SFTConfig(hidden_size=16, layers=2), train_tokenizer(TEXTS, 300), 64)
    curriculum = induction.CopyCurriculum(
        model, steps=60, target_loss=0.5, longest_run=16, batch_size=2, rate=3e-3, seed=0
    )
    assert [curriculum.longest, curriculum.ends(0.5), curriculum.longest] == [4, False, 4]
    assert [curriculum.ends(0.4), curriculum.longest, curriculum.ends(0.6), curriculum.ends(0.4)] == [
        False,
        16,
        False,
        True,
    ]


# -- the whole --------------------------------------------------------------------------------------------------------


@pytest.fixture
def few_rows(tmp_path: Path) -> EnvSettings:
    """60 of the task's rows: a tokenizer learns from 4,000 of them for ten seconds."""
    rows = TLDRSummarize().demonstrations("train")
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(rows[i]) for i in range(60)))
    return EnvSettings(dataset=str(file))


def test_the_seed_decides_the_weights_and_the_folder_is_complete(tmp_path: Path, few_rows: EnvSettings) -> None:
    sft.sft("TLDRSummarize-v0", TINY, tmp_path / "a", few_rows)
    sft.sft("TLDRSummarize-v0", TINY, str(tmp_path / "b"), few_rows)  # a path may be a string
    a, b = (loading.load_model(tmp_path / name) for name in "ab")
    for key, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[key]), key
    record = json.loads((tmp_path / "a" / "sft.json").read_text())
    assert record["config"]["steps"] == 3
    assert record["measured"]["heldout_loss"] > 0
    assert loading.load_tokenizer(tmp_path / "a").eos_token == EOS


def test_a_users_file_and_a_given_model(tmp_path: Path, few_rows: EnvSettings) -> None:
    file = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"Say {i}.\n\nTL;DR:", "completion": f" {i}"} for i in range(8)]
    file.write_text("\n".join(map(json.dumps, rows)))
    sft.sft("TLDRSummarize-v0", TINY, tmp_path / "first", few_rows)
    config = SFTConfig(model=str(tmp_path / "first"), steps=30, batch_size=4, learning_rate=1e-2)
    record = sft.sft("TLDRSummarize-v0", config, tmp_path / "second", EnvSettings(dataset=str(file)))
    assert record["env"]["dataset"] == str(file)
    assert record["measured"]["heldout_loss"] < 5.5  # ln 2048 = 7.6 nats before; none of its rows was learnt


def test_errors_name_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown environment 'Nothing-v0' .*allowed: .*TLDRSummarize-v0"):
        sft.sft("Nothing-v0", TINY, tmp_path)
    file = tmp_path / "wrong.jsonl"
    file.write_text('{"header": "a", "body": "b"}\n')
    with pytest.raises(ValueError, match=r"columns header, body; expected: .*prompt, completion"):
        sft.sft("TLDRSummarize-v0", SFTConfig(), tmp_path, EnvSettings(dataset=str(file)))
    with pytest.raises(ValueError, match=r"found .*prompt"):
        sft.demonstrations(_NoTexts(), "train", EnvSettings())


class _NoTexts(TLDRSummarize):
    def demonstrations(self, split: str) -> list[dict[str, str]]:
        return [{"prompt": "a"}]


def test_batches_hold_prompts_of_about_one_length() -> None:
    task = TLDRSummarize()
    stream = sft.Batches(task, task.load_tokenizer(), task.demonstrations("train"), 4, seed=0)
    padding = []
    for _ in range(8):
        batch = pack(next(stream))
        padding.append((~batch.sees_BLL[:, -1, : batch.prompt_places]).float().mean().item())
    assert sum(padding) / 8 < 0.1


# -- how it is trained ------------------------------------------------------------------------------------------------


def test_micro_batches_are_one_batch() -> None:
    items: list[Item] = [([3, 4, 5, 6], [[7, 8, 0], [9, 0]]), ([2], [[1, 2, 3, 4, 0]]), ([5, 6], [[7, 0]])]
    assert split(items, 10**6) == [[0, 1, 2]]
    # 4 + 2 * 3 positions; then 1 + 5; (2 + 2) * 1 would be 2 * (2 + 5) with the one before
    assert split(items, 12) == [[0], [1], [2]]
    assert split(items, 1) == [[0], [1], [2]]  # a row that alone is too long still goes
    assert split(items, 14) == [[0], [1, 2]]
    found = []
    for most in (10**6, 14, 1):
        config = SFTConfig(micro_batch_tokens=most, steps=1)
        model = tiny.llama(20, scale=0.3)
        phase = sft.Supervised(TunedModel(model, config, 0), _Fixed(items), config, dict)
        losses = list(phase.losses(0))
        assert len(losses) == len(split(items, most))
        sum(losses, torch.zeros(())).backward()
        found.append((sum(loss.item() for loss in losses), model.model.layers[0].mlp.up_proj.weight.grad))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-5)
        torch.testing.assert_close(gradient, found[0][1], atol=1e-5, rtol=0)


class _Fixed(sft.Batches):
    """Always the same batch."""

    def __init__(self, items: list[Item]) -> None:
        self.items, self.source = items, []

    def __next__(self) -> list[Item]:
        return self.items


def test_an_epoch_has_every_row_once_in_another_order() -> None:
    rows = [{"prompt": f"{i}", "completion": " a"} for i in range(10)]
    task, tokenizer = TLDRSummarize(), train_tokenizer(TEXTS, 300)
    stream = sft.Batches(task, tokenizer, rows, 5, seed=0, pool=2, once=True)
    passes = []
    for _ in range(3):
        passes.append([prompt for _ in range(2) for prompt, _ in next(stream)])
    assert all(sorted(one) == sorted(passes[0]) for one in passes)
    assert len({str(one) for one in passes[0]}) == 10
    assert [SFTConfig(epochs=n, batch_size=4).updates(10) for n in (0.01, 1.0, 2.0)] == [1, 2, 5]
    assert SFTConfig(steps=7).updates(10) == 7


@pytest.mark.parametrize("make", [tiny.llama, lambda size: tiny.gpt2(size, 64)], ids=["llama", "gpt2"])
def test_gradient_checkpointing_changes_nothing(make: Any) -> None:
    batch = pack([([3, 4, 5, 6], [[7, 8, 0], [9, 0]]), ([2], [[1, 2, 3, 4, 0]])])
    gradients = []
    for checkpointing in (False, True):
        model = make(20)
        model.config.attention_dropout = 0.5  # which must stay off
        tuned = TunedModel(model, SFTConfig(gradient_checkpointing=checkpointing), 0)
        assert model.training == checkpointing
        sft.sft_loss(tuned.model, batch).backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_an_encoder_decoder_is_sharded_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SFTConfig(shard=True, device="cpu")
    assert isinstance(TunedModel(bart(6), config, 0).shard(), BartForConditionalGeneration)  # of one process
    monkeypatch.setattr(processes, "size", lambda: 2)
    with pytest.raises(ValueError, match="BartForConditionalGeneration is an encoder-decoder, which cannot be sharded"):
        TunedModel(bart(6), config, 0)


def test_bfloat16_is_near_float32_and_finite() -> None:
    batch = pack([([3, 4, 5, 6], [[7, 8, 0], [9, 0]]), ([2], [[1, 2, 3, 4, 0]])])
    losses = []
    dtypes: tuple[Any, ...] = ("float32", "bfloat16")
    for dtype in dtypes:
        config = SFTConfig(dtype=dtype)
        tuned = TunedModel(tiny.llama(20, scale=0.3), config, 0)
        with tuned.precision():
            nll, _ = sft.completion_nll(tuned.model, batch)
        nll.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in tuned.model.parameters())
        assert {p.dtype for p in tuned.model.parameters()} == {torch.float32}
        losses.append(nll.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert losses[1] != losses[0]


def test_held_out_losses_by_subset(tmp_path: Path, few_rows: EnvSettings) -> None:
    """That of all rows is the mean over their tokens, and is logged as training goes."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"prompt": f"Say {i}.", "completion": f" {i}" * (i % 3 + 1), "subset": "ab"[i % 2]} for i in range(8)]
    for split_name in ("train", "validation"):
        (folder / f"{split_name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = dataclasses.replace(TINY, steps=4, eval_every=2, eval_rows=8)
    record = sft.sft("TLDRSummarize-v0", config, tmp_path / "out", EnvSettings(dataset=str(folder)))
    measured = record["measured"]
    low, high = sorted(measured[f"heldout_loss/{subset}"] for subset in "ab")
    assert low < measured["heldout_loss"] < high
    logged = [json.loads(line) for line in (tmp_path / "out" / "progress.json").read_text().splitlines()]
    assert [row["train/updates"] for row in logged if "supervised/heldout_loss" in row] == [TINY.copy_steps + 2]
    assert "supervised/heldout_loss/a" in logged[TINY.copy_steps + 1]


def test_a_lora_is_merged_and_only_it_is_trained(tmp_path: Path, few_rows: EnvSettings) -> None:
    sft.sft("TLDRSummarize-v0", TINY, tmp_path / "first", few_rows)
    config = dataclasses.replace(TINY, model=str(tmp_path / "first"), lora_rank=2, learning_rate=1e-2, steps=3)
    sft.sft("TLDRSummarize-v0", config, tmp_path / "second", few_rows)
    assert not [path for path in (tmp_path / "second").iterdir() if "adapter" in path.name]
    before, after = (loading.load_model(tmp_path / name).state_dict() for name in ("first", "second"))
    assert before.keys() == after.keys()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in after if "_proj.weight" in name}
    with pytest.raises(ValueError, match="lora_rank=2 needs a model to start from"):
        dataclasses.replace(TINY, lora_rank=2)
