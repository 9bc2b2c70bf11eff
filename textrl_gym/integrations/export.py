"""export(): the trained model of a run as a folder that plain transformers, vLLM and llama.cpp's converter load.

What is written: weights (safetensors), tokenizer with its chat template, a generation_config with the tokens that end a
turn, and a model card with what is known of the run. A LoRA is written as peft's adapter on its base, or merged into
the weights.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from transformers import GenerationConfig, PreTrainedModel

from textrl_gym import files, registry
from textrl_gym.evaluation.metrics import metric, metric_names, number
from textrl_gym.models import adapters, loading, lora, packing
from textrl_gym.training import run_folder
from textrl_gym.training.agent import Agent
from textrl_gym.training.run_folder import Run

if TYPE_CHECKING:
    from peft import PeftModel

CARD = "README.md"
MOST_SUPPRESSED = 4096
"""At most so many rows of the model beyond the tokenizer are named in generation_config."""
MOST_PROMPT = 600
"""Letters of the example in the card."""


def export(
    run: str | Path, to: str | Path, *, merge: bool = False, push: str | None = None, trust_code: bool = False
) -> Path:
    """Write the model of a run's folder for other libraries; returns the folder.

    Args:
        run: a folder that an agent was saved in.
        to: a new or empty folder.
        merge: add a LoRA to the weights, so that no peft is needed to load it.
        push: also upload it to this repository of the Hub, a private one where it does not exist yet.
        trust_code: import what the run's folder names, though it is not part of textrl-gym.

    Raises:
        ValueError: the folder is not empty; the run trained nothing; merge without a LoRA; a LoRA whose base has no
            name that others can load.
    """
    to, source = Path(to), Path(run)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ValueError(f"{str(to)!r} is not empty: name a new folder to export to")
    agent: Agent = registry.load_agent(source, trust_code=trust_code, device="cpu")
    if not agent.trains:
        raise ValueError(f"{type(agent).__name__} trains nothing: there is no model of its own to export")
    is_lora = lora.is_lora(agent.policy.model)
    if merge and not is_lora:
        raise ValueError(f"--merge is for runs with a LoRA, and {str(source)!r} has none: leave it out")
    base = base_of(agent)
    if is_lora and not merge and base is None:
        raise ValueError("the base of this LoRA has no name under which others could load it: export it with --merge")
    generation = generation_config(agent)
    card = model_card(agent, _read_run(source), base, adapter=is_lora and not merge)
    with loading.no_bars():
        _write_model(agent, to, merge, base)
        agent.env.tokenizer.save_pretrained(to)
        generation.save_pretrained(to)
    files.write_text(to / CARD, card)
    files.give_usual_modes(to)
    if push is not None:
        _push(to, push)
    return to


def base_of(agent: Agent) -> str | None:
    """What the run started from, as other libraries can load it: a Hub id or an absolute path; None: no such name."""
    name = agent.model_spec
    if name is None:
        return None
    if Path(name).is_dir():
        return str(Path(name).resolve())
    return name if "/" in name else None  # smollm2-135m, for one, is loaded from a package


def _write_model(agent: Agent, to: Path, merge: bool, base: str | None) -> None:
    model: Any = agent.policy.model
    if not lora.is_lora(model):
        cast("PreTrainedModel", model).save_pretrained(to)
        return
    adapted = cast("PeftModel", model)
    with adapters.quiet():
        if merge:
            cast("Any", adapted).merge_and_unload().save_pretrained(to)
            return
        config: Any = adapted.active_peft_config
        config.base_model_name_or_path = base
        adapted.save_pretrained(str(to))
    (to / CARD).unlink(missing_ok=True)  # peft's own, which knows nothing of the run


def generation_config(agent: Agent) -> GenerationConfig:
    """The model's own, with the ends of a turn and the budget that the run had."""
    env, bare = agent.env, lora.bare(agent.policy.model)
    config: GenerationConfig = getattr(bare, "generation_config", None) or GenerationConfig()
    if bare.config.is_encoder_decoder:
        # Published ones have beams, least lengths and forced tokens in theirs, none of which the run had.
        config = GenerationConfig(decoder_start_token_id=packing.decoder_start(bare))
    config.eos_token_id = list(env.end_ids)
    config.pad_token_id = env.tokenizer.pad_token_id if env.tokenizer.pad_token_id is not None else env.end_ids[0]
    config.max_new_tokens, config.max_length = env.max_new_tokens, None
    rows = bare.get_output_embeddings().weight.shape[0]
    # Rows beyond the tokenizer were never sampled in training, and mean nothing.
    if agent.policy.vocab_size < rows <= agent.policy.vocab_size + MOST_SUPPRESSED:
        config.suppress_tokens = list(range(agent.policy.vocab_size, rows))
    return config


def _read_run(folder: Path) -> Run | None:
    """The logs of the run; None for a checkpoint that was saved elsewhere."""
    return run_folder.read_run(folder) if (folder / run_folder.EVALUATIONS).is_file() else None


def _push(folder: Path, repository: str) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repository, private=True, exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=str(folder))


# -- the model card ---------------------------------------------------------------------------------------------------


def model_card(agent: Agent, run: Run | None, base: str | None, adapter: bool) -> str:
    """README.md of the exported folder, with the metadata that the Hub reads."""
    from huggingface_hub import ModelCardData

    name = type(agent).__name__
    metadata = ModelCardData(
        base_model=base if base and not Path(base).is_dir() else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text2text-generation" if _is_seq2seq(agent) else "text-generation",
        tags=["textrl-gym", "reinforcement-learning", name.lower()],
    )
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {name} on {type(agent.env.task).__name__}",
        f"A language model trained with {name} by [textrl-gym](https://pypi.org/project/textrl-gym/).",
        "## Use",
        _use(agent, run, adapter),
        "## Training",
        _table(("", ""), _training(agent, base)),
        "## Evaluation",
        _evaluation(run),
        "## Settings",
        _table(("setting", "value"), _settings(dataclasses.asdict(agent.config))),
    ]
    return "\n\n".join(parts) + "\n"


def _is_seq2seq(agent: Agent) -> bool:
    return lora.bare(agent.policy.model).config.is_encoder_decoder


def _use(agent: Agent, run: Run | None, adapter: bool) -> str:
    prompts = [sample["prompt"] for sample in run.samples] if run else []
    prompt = next((one for one in prompts if len(one) <= MOST_PROMPT), "...")
    stops = f", stop_strings={list(agent.env.stop)!r}, tokenizer=tokenizer" if agent.env.stop else ""
    auto = "AutoModelForSeq2SeqLM" if _is_seq2seq(agent) else "AutoModelForCausalLM"
    # An encoder-decoder gives its completion alone.
    output = "output[0]" if _is_seq2seq(agent) else 'output[0, inputs["input_ids"].shape[1]:]'
    lines = [
        "```python",
        f"from transformers import {auto}, AutoTokenizer{', GenerationConfig' if adapter else ''}",
        "",
        'folder = "..."  # where this file lies, or the name of its repository',
        *(["# Needs peft, by which the base model is loaded and this adapter on it."] if adapter else []),
        f"model, tokenizer = {auto}.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)",
        # Of an adapter's folder transformers reads nothing but the adapter.
        *(["model.generation_config = GenerationConfig.from_pretrained(folder)"] if adapter else []),
        # A literal of Python without backticks, which would end the block.
        f"prompt = {json.dumps(prompt).replace('`', chr(92) + 'u0060')}",
        'inputs = tokenizer(prompt, return_tensors="pt")',
        f"output = model.generate(**inputs, do_sample=False{stops})",
        f"print(tokenizer.decode({output}, skip_special_tokens=True))",
        "```",
    ]
    notes = []
    if agent.env.tokenizer.chat_template:
        notes.append("The tokenizer has a chat template: for conversations use `tokenizer.apply_chat_template`.")
    if type(agent).play is not Agent.play:
        notes.append("In the run this agent decodes by a way of its own; here is the policy that it decodes with.")
    return "\n\n".join(["\n".join(lines), *notes])


def _training(agent: Agent, base: str | None) -> list[tuple[str, str]]:
    settings, mdp = agent.env.settings, agent.env
    seconds = sum(agent.seconds.values())
    return [
        ("base model", _public(base or agent.model_spec or f"the model that {type(mdp.task).__name__} comes with")),
        ("environment", type(mdp.task).__name__),
        ("data", _public(settings.get("dataset") or "the environment's own prompts")),
        ("reward", _public(settings.get("reward") if settings.get("reward") is not None else mdp.task.reward)),
        ("KL penalty", f"{agent.kl.coef:g} in the {agent.kl.where}, estimator {agent.kl.estimator}"),
        ("prompt and completion, at most", f"{mdp.max_prompt_tokens} and {mdp.max_new_tokens} tokens"),
        ("updates, tokens generated", f"{agent.num_updates:,}, {agent.num_timesteps:,}"),
        ("time", f"{seconds:,.0f} s"),
        ("seed", str(agent.seed)),
    ]


def _public(name: object) -> str:
    """A name for readers elsewhere: of what is on this machine the last part, since a card may be published."""
    text = str(name)
    return f"{Path(text).name} (on the machine of the training)" if Path(text).expanduser().exists() else text


def _evaluation(run: Run | None) -> str:
    if run is None:
        return "None is known."
    rows = [
        (metric(key).heading, number(run.start, key), number(run.end, key))
        for key in metric_names([run.start, run.end])
    ]
    return f"On held-out prompts, before training and at its end:\n\n{_table(('', 'before', 'after'), rows)}"


def _settings(config: Mapping[str, object]) -> list[tuple[str, str]]:
    return [(f"`{name}`", str(value)) for name, value in config.items()]


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, ("---",) * len(head), *(tuple(map(_plain, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _plain(text: str) -> str:
    """A text as one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
