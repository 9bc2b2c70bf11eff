"""Folders of LoRA adapters as models: base plus adapter everywhere, by safetensors only, from any working folder."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from textrl_gym.agents import GRPO
from textrl_gym.envs.tldr_summarize import TLDRSummarize
from textrl_gym.evaluation import health
from textrl_gym.mdp.env_settings import EnvSettings
from textrl_gym.models import adapters, loading, lora, tiny
from textrl_gym.pipeline import reward_model, sft
from textrl_gym.pipeline.reward_data import RewardModelConfig

SMALL: dict[str, Any] = {"rollout_episodes": 8, "group_size": 4, "learning_rate": 1e-2, "device": "cpu"}
IDS = torch.tensor([[1, 2, 3, 4, 1, 3]])
SYMBOLS = ("a", "b", "c", "d")


def adapted(base: Any, seed: int = 0, **settings: Any) -> Any:
    """The base with a LoRA that changes it, as supervised training leaves one."""
    torch.manual_seed(seed)
    chosen: dict[str, Any] = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    config = LoraConfig(**chosen)
    with adapters.quiet():
        model: Any = get_peft_model(base, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.3)
    return model.eval()


def save_adapter(folder: Path, base: Path, name: str | None = None, seed: int = 0, **settings: Any) -> torch.Tensor:
    """Write an adapter as peft does; its base is named by `name`. Returns the logits of base plus adapter."""
    model = adapted(AutoModelForCausalLM.from_pretrained(base), seed, **settings)
    model.peft_config["default"].base_model_name_or_path = str(base) if name is None else name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft: its own loader would be wrong where embeddings are tied
        model.save_pretrained(folder)
    return logits(model)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def move(agent: GRPO) -> None:
    """Stand in for training."""
    with torch.no_grad():
        for p in agent.policy.parameters():
            if p.requires_grad:
                p.add_(0.05)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny model of CopyText's vocabulary, with its tokenizer."""
    folder = tmp_path / "work" / "models" / "llama"
    tiny.llama(5, scale=0.3).save_pretrained(folder)
    tiny.symbol_tokenizer(SYMBOLS).save_pretrained(folder)
    return folder


@pytest.fixture
def sft_adapter(base: Path) -> tuple[Path, torch.Tensor]:
    """An adapter on it, and the logits of both."""
    folder = base.parents[1] / "runs" / "sft"
    return folder, save_adapter(folder, base, "models/llama")


# -- what training starts from ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_training_starts_from_base_plus_adapter(
    sft_adapter: tuple[Path, torch.Tensor], base: Path, lora_rank: int, tmp_path: Path
) -> None:
    folder, expected = sft_adapter
    assert (logits(loading.load_model(base)) - expected).abs().max() > 0.5
    agent = GRPO("CopyText-v0", str(folder), lora_rank=lora_rank, **SMALL)
    reference = agent.policy.reference
    assert reference is not None
    assert_close(logits(agent.policy.model), expected)
    rollout = agent.collect()
    assert_close(agent.policy.logprobs(rollout), reference.logprobs(rollout))
    card = health.card(agent.policy, rollout, end_ids=(0,), fresh=True)
    (kl,) = (line for line in card if "KL to the reference" in line.name)
    assert kl.ok and float(kl.value) == pytest.approx(0, abs=1e-5)
    # The reference stays the adapter's model, in a checkpoint too.
    move(agent)
    agent.save(tmp_path / "saved")
    loaded = GRPO.load(tmp_path / "saved", device="cpu")
    assert loaded.policy.reference is not None
    assert_close(loaded.policy.reference.logprobs(rollout), rollout.logp_BT)
    assert_close(logits(loaded.policy.model), logits(agent.policy.model))
    assert (logits(loaded.policy.model) - expected).abs().max() > 1e-3


def test_a_loaded_model_with_a_trained_adapter_is_its_own_reference(base: Path, tmp_path: Path) -> None:
    model = adapted(AutoModelForCausalLM.from_pretrained(base))
    expected = logits(model)
    agent = GRPO("CopyText-v0", model, **SMALL)
    reference = agent.policy.reference
    assert reference is not None and isinstance(reference.model, PeftModel)
    shared = {id(p) for p in model.parameters()} & {id(p) for p in reference.model.parameters()}
    assert len(shared) == sum(not p.requires_grad for p in model.parameters()), "the base is held once"
    move(agent)
    assert_close(logits(reference.model), expected)
    assert (logits(agent.policy.model) - expected).abs().max() > 1e-3
    agent.save(tmp_path / "saved")
    loaded = GRPO.load(tmp_path / "saved", device="cpu")
    assert loaded.policy.reference is not None
    assert_close(logits(loaded.policy.reference.model), expected)
    assert_close(logits(loaded.policy.model), logits(agent.policy.model))
    with pytest.raises(ValueError, match="lora_rank=4 and a model with a trained adapter"):
        GRPO("CopyText-v0", model, lora_rank=4, **SMALL)


def test_sft_and_reward_models_start_from_it(tmp_path: Path) -> None:
    task = TLDRSummarize()
    tokenizer = task.load_tokenizer()
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")  # the adapter's folder has none
    expected = save_adapter(tmp_path / "adapter", tmp_path / "base")
    rows = [{"prompt": f"Say {i}.\n\nTL;DR:", "completion": f" {i}"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    name, still = str(tmp_path / "adapter"), 1e-12  # at this learning rate the model stays where it starts
    config = sft.SFTConfig(model=name, steps=1, batch_size=2, eval_rows=2, learning_rate=still)
    sft.sft("TLDRSummarize-v0", config, tmp_path / "sft", EnvSettings(dataset=str(tmp_path / "rows.jsonl")))
    pairs = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": " no"} for r in rows]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    own: dict[str, Any] = {"batch_size": 8, "replaced_token_steps": 0, "eval_prompts": 2, "learning_rate": still}
    pairs_config = RewardModelConfig(model=name, dataset=(str(tmp_path / "pairs.jsonl"),), **own)
    reward_model.train_reward_model("TLDRSummarize-v0", pairs_config, tmp_path / "rm")
    whole: Any = loading.load_model(name)
    tuned: Any = loading.load_model(tmp_path / "sft")
    rewards: Any = loading.load_classifier(tmp_path / "rm")
    assert_close(logits(whole), expected)
    assert_close(logits(tuned), expected)
    with torch.no_grad():
        assert_close(rewards.base_model(IDS)[0], whole.base_model(IDS)[0])


def test_a_saved_agent_is_a_model(base: Path, tmp_path: Path) -> None:
    agent = GRPO("CopyText-v0", str(base), lora_rank=2, **SMALL)
    move(agent)
    agent.save(tmp_path / "agent")
    task = agent.env.task
    for name in ("agent", "agent/model"):  # the folder as the user knows it, and the adapter in it
        assert_close(logits(task.load_model(str(tmp_path / name))), logits(agent.policy.model))
        assert task.load_tokenizer(str(tmp_path / name)).get_vocab() == agent.env.tokenizer.get_vocab()
    # And a base: an adapter that peft trained on it.
    expected = save_adapter(tmp_path / "on_agent", base, "agent")
    assert (logits(task.load_model(str(tmp_path / "on_agent"))) - expected).abs().max() > 1e-3  # not on the base alone
    again = GRPO("CopyText-v0", str(tmp_path / "on_agent"), **SMALL)
    assert_close(logits(again.policy.model), logits(loading.load_model(tmp_path / "on_agent", base=agent_base(agent))))
    # The task's own model has no folder.
    own = GRPO("CopyText-v0", lora_rank=2, **SMALL)
    move(own)
    own.save(tmp_path / "own")
    with torch.no_grad():
        ids = IDS[:, :4]
        assert_close(task.load_model(str(tmp_path / "own"))(ids).logits, own.policy.model(ids).logits)


def agent_base(agent: GRPO) -> Any:
    return agent.policy.model.merge_and_unload()


# -- where the base is ------------------------------------------------------------------------------------------------


def test_a_relative_base_is_right_from_any_folder(
    sft_adapter: tuple[Path, torch.Tensor], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected = sft_adapter
    (elsewhere := tmp_path / "elsewhere").mkdir()
    for place in (elsewhere, folder, base.parents[1], tmp_path):
        monkeypatch.chdir(place)
        assert_close(logits(loading.load_model(os.path.relpath(folder))), expected)
    # Another model of that name, where the command is given: which one is meant cannot be known.
    other = shutil.copytree(base, elsewhere / "models" / "llama")
    monkeypatch.chdir(elsewhere)
    with pytest.raises(ValueError, match="there are 2 folders of that name") as error:
        loading.load_model(folder)
    assert str(other) in str(error.value) and str(base) in str(error.value)


def test_adapters_that_stand_on_themselves_are_refused(sft_adapter: tuple[Path, torch.Tensor]) -> None:
    folder, _ = sft_adapter
    name_base(folder, str(folder))
    with pytest.raises(ValueError, match="more than 8 deep"):
        loading.load_model(folder)
    name_base(folder, "no/such/model")
    with pytest.raises(ValueError, match=r"the base model of the adapter .*sft' cannot be loaded: .*'no/such/model'"):
        loading.load_model(folder)
    name_base(folder, None)
    with pytest.raises(ValueError, match=r"names no base model \(base_model_name_or_path\)"):
        loading.load_model(folder)


def test_an_adapter_on_an_adapter(sft_adapter: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, _ = sft_adapter
    whole: Any = loading.load_model(folder)
    whole.save_pretrained(tmp_path / "merged")
    expected = save_adapter(tmp_path / "second", tmp_path / "merged", str(folder), seed=1)
    assert_close(logits(loading.load_model(tmp_path / "second")), expected)


def name_base(folder: Path, name: str | None) -> None:
    change_config(folder, base_model_name_or_path=name)


def change_config(folder: Path, **fields: Any) -> None:
    file = folder / adapters.CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_an_adapter_of_the_hub(
    sft_adapter: tuple[Path, torch.Tensor], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache's layout: snapshots hold links to blobs, outside of their folder."""
    folder, expected = sft_adapter
    hub = tmp_path / "hub" / "models--someone--adapter"
    snapshot = hub / "snapshots" / "abc"
    for path in (snapshot, hub / "blobs", hub / "refs"):
        path.mkdir(parents=True)
    (hub / "refs" / "main").write_text("abc")
    name_base(folder, str(base))
    for number, file in enumerate((adapters.CONFIG_FILE, adapters.WEIGHTS_FILE)):
        shutil.copy(folder / file, hub / "blobs" / str(number))
        (snapshot / file).symlink_to(f"../../blobs/{number}")
    assert_close(logits(loading.load_model(snapshot)), expected)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert_close(logits(loading.load_model("someone/adapter")), expected)
    assert loading.load_tokenizer("someone/adapter").get_vocab() == loading.load_tokenizer(base).get_vocab()


# -- what adapters may be ---------------------------------------------------------------------------------------------


def test_a_head_of_its_own_beside_tied_embeddings(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=5, tie_word_embeddings=True, initializer_range=0.3, **sizes))
    model.save_pretrained(tmp_path / "tied")
    for number, target in enumerate((["lm_head"], ["embed_tokens", "q_proj"], ["q_proj", "lm_head"])):
        folder = tmp_path / str(number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of peft: merging by its own means would be wrong
            expected = save_adapter(folder, tmp_path / "tied", target_modules=target)
        whole: Any = loading.load_model(folder)
        assert_close(logits(whole), expected)
        whole.save_pretrained(folder / "whole")
        assert_close(logits(loading.load_model(folder / "whole")), expected)


def test_tokens_that_the_adapter_added(base: Path, tmp_path: Path) -> None:
    bigger = AutoModelForCausalLM.from_pretrained(base)
    bigger.resize_token_embeddings(7)
    model = adapted(bigger, modules_to_save=["embed_tokens", "lm_head"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of peft: it saves the embeddings
        model.save_pretrained(tmp_path / "adapter")
    name_base(tmp_path / "adapter", str(base))
    assert_close(logits(loading.load_model(tmp_path / "adapter")), logits(model))


def test_a_classifier_with_its_head_in_the_adapter(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0)
    model = adapted(classifier, task_type="SEQ_CLS")
    model.save_pretrained(tmp_path / "rm")
    name_base(tmp_path / "rm", str(base))
    loaded: Any = loading.load_classifier(tmp_path / "rm")
    loaded.config.pad_token_id = 0
    assert loaded.config.num_labels == 1
    assert_close(logits(loaded), logits(model))


def test_weights_are_read_from_safetensors_only(sft_adapter: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, _ = sft_adapter
    (folder / adapters.WEIGHTS_FILE).unlink()
    torch.save(Mark(tmp_path / "ran"), folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"has its weights as a pickle \(adapter_model.bin\), which could run code"):
        loading.load_model(folder)
    # In a checkpoint, where peft's own loader would take it.
    agent = GRPO("CopyText-v0", lora_rank=2, **SMALL)
    agent.save(tmp_path / "saved")
    saved = tmp_path / "saved" / "model"
    tensors = load_file(saved / adapters.WEIGHTS_FILE)
    (saved / adapters.WEIGHTS_FILE).unlink()
    torch.save(tensors, saved / "adapter_model.bin")
    (tmp_path / "saved" / "checkpoint.json").unlink()  # of its maker's choosing, too
    with pytest.raises(ValueError, match=r"has its weights as a pickle \(adapter_model.bin\)"):
        GRPO.load(tmp_path / "saved", device="cpu")
    assert not (tmp_path / "ran").exists()


class Mark:
    """What leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_what_cannot_be_loaded_is_refused_in_words(sft_adapter: tuple[Path, torch.Tensor], base: Path) -> None:
    folder, expected = sft_adapter
    file = folder / adapters.WEIGHTS_FILE
    good = load_file(file)
    name = next(n for n in good if "lora_B" in n)
    cases = {
        "it has no weights for .*lora_B": {n: t for n, t in good.items() if n != name},
        "the base has no place for .*other": good | {"base_model.model.other.lora_B.weight": torch.ones(3, 2)},
        "size mismatch for .*lora_B": good | {name: torch.zeros(3, 2)},
        "cannot be merged: .*NaN": good | {name: good[name] / 0},
    }
    for words, tensors in cases.items():
        save_file(tensors, file)
        with pytest.raises(ValueError, match=words):
            loading.load_model(folder)
    file.write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"adapter_model.safetensors' cannot be read"):
        loading.load_model(folder)
    save_file(good, file)
    assert_close(logits(loading.load_model(folder)), expected)
    change_config(folder, peft_type="IA3")
    with pytest.raises(ValueError, match="is of the kind 'IA3'; allowed: LORA"):
        loading.load_model(folder)
    # peft would import the module of that name.
    change_config(folder, peft_type="LORA", megatron_config={"a": 1}, megatron_core="folder.payload")
    with pytest.raises(ValueError, match="has 'megatron_config' set"):
        loading.load_model(folder)


def test_what_changes_nothing_is_told_from_what_does() -> None:
    fresh = lora.add_lora(tiny.llama(5), rank=2, alpha=4, seed=0)
    assert lora.changes_nothing(fresh)
    assert not lora.changes_nothing(adapted(tiny.llama(5)))
    with adapters.quiet():
        whole = get_peft_model(tiny.llama(5), LoraConfig(r=2, target_modules="all-linear", modules_to_save=["lm_head"]))
    assert not lora.changes_nothing(whole)
