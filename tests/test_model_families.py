"""Families of models: right beside their own plain forward, by whichever way; or refused in words, and at once."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from model_families import BEGIN, END, PAGE, WINDOW, V, compare, table, tiny_model, truth, walk
from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel

import textrl_gym  # noqa: F401 - registers the environments
from textrl_gym.agents import GRPO
from textrl_gym.cli.main import main
from textrl_gym.envs.tldr_summarize import TLDRSummarize
from textrl_gym.models import positions, tiny
from textrl_gym.policy import trial
from textrl_gym.policy.backbone import Trunk
from textrl_gym.policy.policy import Policy

# Another order of the same sums moves these random models by up to 1e-5 nats; a fault moves them by 0.1 and more.
ATOL = 1e-3


def checked(family: str, window: int | None = None, **changes: Any) -> tuple[bool, bool, bool]:
    """Which ways were taken: shares, pads, caches; all of them right."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = compare(tiny_model(family, window, **changes))
    assert found.worst < ATOL, found
    return found.ways.shares, found.ways.pads, found.ways.caches


@pytest.mark.parametrize(
    ("family", "window", "ways"),
    [
        ("llama", None, (True, True, True)),
        # Attention gets no window from these, and used to ignore it beyond its length.
        ("phimoe", WINDOW, (False, True, True)),
        ("qwen2_moe", WINDOW, (False, True, True)),
        ("doge", WINDOW, (False, True, True)),
        ("mistral", WINDOW, (True, True, True)),
        # Positions that padding on the left shifts.
        ("bart", None, (False, False, False)),
        ("roformer", None, (False, False, False)),
        ("xlm-roberta", None, (False, False, False)),
        # Raw errors before.
        ("deepseek_v3", None, (False, True, True)),
        ("minicpm3", None, (False, True, True)),
        ("afmoe", None, (False, True, True)),
        ("jetmoe", None, (False, True, True)),
        ("minimax", None, (False, True, True)),
        ("mamba", None, (False, True, False)),
    ],
)
def test_a_family_is_right_by_the_ways_that_are_left(
    family: str, window: int | None, ways: tuple[bool, bool, bool]
) -> None:
    assert checked(family, window) == ways


def rotary(**scaling: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, "factor": 4.0, **scaling}}


@pytest.mark.parametrize("border", [16, 24, 40])
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_are_scaled_by_the_length_are_right_below_their_border_only(kind: str, border: int) -> None:
    if kind == "dynamic":
        family, sizes = "llama", {"max_position_embeddings": border, **rotary(rope_type=kind)}
    else:
        factors = {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 8.0]}
        family = "phi3"
        sizes = rotary(rope_type=kind, original_max_position_embeddings=border, **factors)
        sizes["original_max_position_embeddings"] = border
    if border == 40:  # prompts of 20 tokens and 8 more do not come there
        assert checked(family, **sizes) == (True, True, True)
        return
    with pytest.raises(ValueError, match="its positions are scaled by the length of the text"):
        checked(family, **sizes)


def test_a_longer_text_is_tried_when_it_crosses_a_border(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    examine = trial.examine

    def watched(runner: Any, longest: int, borders: list[int]) -> trial.Ways:
        lengths.append(longest)
        return examine(runner, longest, borders)

    monkeypatch.setattr(trial, "examine", watched)
    trunk = Trunk(tiny_model("phimoe", 32))
    assert trunk.try_out(20).shares
    for reach in range(20, 33):  # as texts grow that are stepped through
        assert trunk.try_out(reach).shares
    with pytest.warns(UserWarning, match="PhimoeForCausalLM cannot share a prompt .*its numbers would change"):
        assert not trunk.try_out(60).shares
    assert lengths == [14, 52]  # 32 + 32 / 4 + 12 tokens go well beyond the window


def test_what_cannot_be_run_is_refused_before_the_first_sample() -> None:
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=5)
    encoder = BertLMHeadModel(config).eval()  # is_decoder is False by default: it sees what follows
    for make in (
        lambda: GRPO("CopyText-v0", encoder, device="cpu"),
        lambda: GRPO("CopyText-v0", None, encoder, device="cpu"),
        lambda: gym.make("CopyText-v0", kl_coef=0.1, reference=encoder),
    ):
        with pytest.raises(ValueError, match=r"BertLMHeadModel is no policy on texts of 5 tokens: .* is_decoder=True"):
            make()


def test_what_is_no_causal_lm_is_refused() -> None:
    with pytest.raises(ValueError, match="a policy is a causal LM of transformers, not a Linear"):
        Policy(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="LlamaModel has no language-model head"):
        Policy(tiny.llama(5).model)


def gpt2(places: int) -> GPT2LMHeadModel:
    sizes: dict[str, Any] = {"n_embd": 8, "n_layer": 1, "n_head": 1}
    return GPT2LMHeadModel(GPT2Config(vocab_size=5, n_positions=places, **sizes)).eval()


def test_too_few_positions_are_an_error_at_once() -> None:
    words = r"has 4 positions, and prompts of at most 2 tokens and completions of at most 3 need 5"
    for make in (
        lambda: GRPO("CopyText-v0", gpt2(4), device="cpu"),
        lambda: GRPO("CopyText-v0", gpt2(5), gpt2(4), device="cpu"),
        lambda: gym.make("CopyText-v0", kl_coef=0.1, reference=gpt2(4)),
    ):
        with pytest.raises(ValueError, match=words):
            make()
    agent = GRPO("CopyText-v0", gpt2(5), device="cpu")
    with pytest.raises(ValueError, match=r"has 5 positions, and .*completions of at most 4 need 6"):
        agent.set_env(gym.make("CopyText-v0", max_new_tokens=4))


@pytest.mark.parametrize(
    ("family", "rows", "places"),
    [
        ("gpt2", 28, 28),
        ("opt", 28, 28),
        ("bart", 28, 28),
        ("gptj", 28, 28),
        ("bert", 28, 28),
        ("roformer", 28, 28),
        ("xlm-roberta", 28, 26),  # its first two rows are those of no position and of padding
    ],
)
def test_the_table_of_positions_is_counted(family: str, rows: int, places: int) -> None:
    names = ("max_position_embeddings", "n_positions")
    model = tiny_model(family, **dict.fromkeys(names if family in ("gpt2", "gptj") else names[:1], rows))
    assert positions.limit(model) == places
    truth(model, torch.arange(places) % (V - 4) + 4)
    with pytest.raises((IndexError, RuntimeError)):
        truth(model, torch.arange(places + 1) % (V - 4) + 4)


def test_what_was_made_for_shorter_texts_is_said() -> None:
    assert positions.limit(tiny.llama(5)) is None
    short = tiny_model("llama", max_position_embeddings=16)
    with pytest.warns(UserWarning, match="LlamaForCausalLM was made for texts of at most 16 tokens; "):
        Policy(short).try_out(12, 8)


@pytest.mark.slow  # a minute
def test_every_family_of_transformers_is_right_or_refused_in_words() -> None:
    text = PAGE.read_text(encoding="utf-8")
    written = text.partition(BEGIN)[2].partition(END)[0].strip()
    found = table(walk())  # wrong numbers, and errors that are no ValueError, end it
    if found.partition("\n")[0] == written.partition("\n")[0]:  # the same version of transformers
        assert found == written, "python tests/model_families.py writes docs/models.md anew"


@pytest.mark.parametrize("command", ["sft", "reward-model", "preferences"])
def test_too_few_positions_are_an_error_before_rl_too(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = TLDRSummarize().load_tokenizer()
    sizes: dict[str, Any] = {"n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": len(tokenizer)}
    GPT2LMHeadModel(GPT2Config(n_positions=64, **sizes)).save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    out = tmp_path / ("out.jsonl" if command == "preferences" else "out")
    more = ["--label", "length"] if command == "preferences" else []
    assert main([command, "TLDRSummarize-v0", "--model", str(tmp_path / "short"), "--out", str(out), *more]) == 2
    words = capsys.readouterr().err.replace("\n", " ")
    assert "has 64 positions, and prompts of at most 176 tokens and completions of at most 48 need 224" in words
