"""`textrl-gym export`: the folder is the trained model, as plain transformers reads it."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
import yaml  # type: ignore[import-untyped]
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from textrl_gym.agents import GRPO, Random
from textrl_gym.cli.main import main
from textrl_gym.integrations.export import CARD, export
from textrl_gym.models import loading
from textrl_gym.training.agent import Agent

QUIET: dict[str, Any] = {"progress_bar": False, "eval_every": 0, "eval_episodes": 8}


def trained(out: Path, tokens: int = 100, **settings: Any) -> GRPO:
    agent = GRPO("CopyText-v0", rollout_episodes=16, learning_rate=3e-3, out=out, **settings)
    return agent.learn(tokens, **QUIET)


def greedy(agent: Agent) -> tuple[list[str], list[list[int]]]:
    """Prompts of the environment and what the run's policy writes to them."""
    rollout = agent.play(agent.env.remake(16, group_size=1), greedy=True, prompt_indices=range(16))
    ids = [row[mask].tolist() for row, mask in zip(rollout.token_BT, rollout.mask_BT, strict=True)]
    return rollout.prompts, ids


def by_transformers(folder: Path, prompts: list[str]) -> list[list[int]]:
    """As the card says."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    if (folder / "adapter_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    tokenizer, found = AutoTokenizer.from_pretrained(folder), []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**inputs, do_sample=False)
        found.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    return found


def test_plain_transformers_writes_the_same_greedy_text(tmp_path: Path) -> None:
    agent = trained(tmp_path / "run", tokens=3000)
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "model")]) == 0
    prompts, expected = greedy(agent)
    assert len({tuple(ids) for ids in expected}) > 3, "one text for all prompts shows nothing"
    assert by_transformers(tmp_path / "model", prompts) == expected


def named_base(tmp_path: Path) -> Path:
    """The embedded model in a folder, so that it has a name."""
    start = GRPO("CopyText-v0", out=tmp_path / "unused")
    with loading.no_bars():
        start.policy.model.save_pretrained(tmp_path / "base")
    start.env.tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("merge", [True, False])
def test_a_lora_merged_or_on_its_base_writes_the_same(
    merge: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named_base(tmp_path)
    monkeypatch.chdir(tmp_path)
    agent = trained(tmp_path / "run", tokens=1000, model="base", lora_rank=4)  # a relative name
    to = export("run", "model", merge=merge)
    assert (to / "adapter_config.json").exists() != merge
    prompts, expected = greedy(agent)
    start = GRPO("CopyText-v0", model="base", rollout_episodes=16, out=tmp_path / "start")
    assert greedy(start)[1] != expected, "the adapter changed no text: this shows nothing"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert by_transformers(tmp_path / "model", prompts) == expected
    again = GRPO("CopyText-v0", model=str(tmp_path / "model"), rollout_episodes=16, out=tmp_path / "next")
    assert greedy(again) == (prompts, expected)


def test_data_and_reward_of_the_run_are_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    words = ("The film was", "The room is", "I think it")
    Path("rows.jsonl").write_text("".join(json.dumps({"prompt": w}) + "\n" for w in words), encoding="utf-8")
    start = GRPO("SentimentContinue-v0", out="unused")
    with loading.no_bars():
        start.policy.model.save_pretrained("start")
    start.env.tokenizer.save_pretrained("start")
    env = gym.make(
        "SentimentContinue-v0", dataset="rows.jsonl", reward=lambda prompts, texts, **_: [len(t) for t in texts]
    )
    GRPO(env, model="start", rollout_episodes=16, out="run").learn(1, **QUIET)
    with pytest.raises(ValueError, match="which cannot be saved"):
        GRPO.load("run")
    for name in ("rows.jsonl", "start/model.safetensors", "start/config.json"):
        Path(name).unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["export", "../here/run", "--to", "model"]) == 0
    saved = AutoModelForCausalLM.from_pretrained("../here/run/model").state_dict()
    written = AutoModelForCausalLM.from_pretrained("model").state_dict()
    assert all(torch.equal(written[name], weight) for name, weight in saved.items())
    card = Path("model", CARD).read_text(encoding="utf-8")
    assert "| data | rows.jsonl |" in card and "| reward | a function of Python |" in card


def test_the_base_of_a_lora_may_have_moved(tmp_path: Path) -> None:
    base = named_base(tmp_path)
    agent = trained(tmp_path / "runs" / "run", tokens=300, model=str(base), lora_rank=4)
    prompts, expected = greedy(agent)
    base.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="--base-model"):
        export(tmp_path / "runs" / "run", tmp_path / "model", merge=True)
    where = str(tmp_path / "moved")
    parts = ["export", str(tmp_path / "runs" / "run"), "--to", str(tmp_path / "model"), "--base-model", where]
    assert main([*parts, "--merge"]) == 0
    assert by_transformers(tmp_path / "model", prompts) == expected


def test_what_generation_needs_is_in_the_folder(tmp_path: Path) -> None:
    agent = trained(tmp_path / "run")
    folder = export(tmp_path / "run", tmp_path / "model")
    config = AutoModelForCausalLM.from_pretrained(folder).generation_config
    assert config.eos_token_id == list(agent.env.end_ids)
    assert config.max_new_tokens == agent.env.max_new_tokens
    assert not [*folder.glob("*.bin"), *folder.glob("agent.json"), *folder.glob("training.safetensors")]


def test_rows_of_the_model_beyond_the_tokenizer_are_never_written(tmp_path: Path) -> None:
    agent = GRPO("CopyText-v0", rollout_episodes=16, out=tmp_path / "start")
    size = agent.policy.vocab_size
    agent.policy.model.resize_token_embeddings(size + 3)
    with torch.no_grad():  # far above all others
        agent.policy.model.get_output_embeddings().weight[size:] = 50 * torch.ones(3, 1)
    with loading.no_bars():
        agent.policy.model.save_pretrained(tmp_path / "padded")
    agent.env.tokenizer.save_pretrained(tmp_path / "padded")
    run = GRPO("CopyText-v0", model=str(tmp_path / "padded"), rollout_episodes=16, out=tmp_path / "run")
    run.learn(1, **QUIET)
    export(tmp_path / "run", tmp_path / "model")
    prompts, expected = greedy(run)
    assert by_transformers(tmp_path / "model", prompts) == expected
    # A card may be published: of this machine it tells the folder's own name alone.
    card = (tmp_path / "model" / CARD).read_text(encoding="utf-8")
    assert "| base model | padded (on the machine of the training) |" in card and str(tmp_path) not in card


def test_the_chat_template_is_carried(tmp_path: Path) -> None:
    agent = trained(tmp_path / "run")
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    agent.env.tokenizer.chat_template = template
    agent.save(tmp_path / "run")
    folder = export(tmp_path / "run", tmp_path / "model")
    assert AutoTokenizer.from_pretrained(folder).chat_template == template
    assert "chat template" in (folder / CARD).read_text()


def test_the_card_tells_of_the_run(tmp_path: Path) -> None:
    trained(tmp_path / "run", seed=3)
    folder = export(tmp_path / "run", tmp_path / "model")
    text = (folder / CARD).read_text(encoding="utf-8")
    _, head, body = text.split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert metadata["library_name"] == "transformers" and "grpo" in metadata["tags"]
    assert "base_model" not in metadata  # the embedded one has no name on the Hub
    for line in (
        "| seed | 3 |",
        "| KL penalty | 0.02 in the loss, estimator k1 |",
        "| `learning_rate` | 0.003 |",
        "| environment | CopyText |",
        "AutoModelForCausalLM",
    ):
        assert line in body
    assert "| Score (training reward), sampled |" in body and "| reward | " in body
    # The code that it shows runs.
    code = body.split("```python\n")[1].split("```")[0].replace('folder = "..."', f"folder = {str(folder)!r}")
    scope: dict[str, Any] = {}
    exec(code.replace("print(", "text = ("), scope)
    assert isinstance(scope["text"], str)


def test_files_have_the_modes_of_the_umask(tmp_path: Path) -> None:
    trained(tmp_path / "run")
    before = os.umask(0o027)
    try:
        folder = export(tmp_path / "run", tmp_path / "model")
        GRPO.load(tmp_path / "run").save(tmp_path / "copy")
    finally:
        os.umask(before)
    for written in (folder, tmp_path / "copy", tmp_path / "copy" / "model"):
        assert {stat.S_IMODE(path.stat().st_mode) for path in written.iterdir() if path.is_file()} == {0o640}


def test_what_cannot_be_exported_is_told(tmp_path: Path) -> None:
    trained(tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ValueError, match="full' is not empty"):
        export(tmp_path / "run", tmp_path / "full")
    with pytest.raises(ValueError, match="--merge is for runs with a LoRA"):
        export(tmp_path / "run", tmp_path / "model", merge=True)
    trained(tmp_path / "lora", lora_rank=2)
    with pytest.raises(ValueError, match="has no name under which others could load it: export it with --merge"):
        export(tmp_path / "lora", tmp_path / "model")
    export(tmp_path / "lora", tmp_path / "model", merge=True)


def test_what_trained_nothing_has_no_model_to_export(tmp_path: Path) -> None:
    Random("CopyText-v0", out=tmp_path / "random").learn(0, **QUIET)
    with pytest.raises(ValueError, match="trains nothing"):
        export(tmp_path / "random", tmp_path / "model")


def test_push_uploads_to_a_private_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    class Api:
        def create_repo(self, name: str, **given: Any) -> None:
            calls.append((name, given))

        def upload_folder(self, **given: Any) -> None:
            calls.append(("upload", given))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    trained(tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "model"), "--push", "me/model"]) == 0
    assert calls == [
        ("me/model", {"private": True, "exist_ok": True}),
        ("upload", {"repo_id": "me/model", "folder_path": str(tmp_path / "model")}),
    ]
