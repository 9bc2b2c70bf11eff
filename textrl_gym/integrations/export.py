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

from transformers import GenerationConfig

from textrl_gym import files, registry
from textrl_gym.data import encoding
from textrl_gym.evaluation.metrics import metric, metric_names, number
from textrl_gym.mdp.spaces import stop_strings
from textrl_gym.mdp.task import Task, load_task
from textrl_gym.models import adapters, loading, lora, packing
from textrl_gym.models.tokenizer import vocab_size
from textrl_gym.training import checkpoint, dependencies, run_folder
from textrl_gym.training.agent import Agent
from textrl_gym.training.run_folder import Run

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CARD = "README.md"
MOST_SUPPRESSED = 4096
"""At most so many rows of the model beyond the tokenizer are named in generation_config."""
MOST_PROMPT = 600
"""Letters of the example in the card."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a checkpoint says of its model. The run's data, rewards, reference and critic are not read."""

    folder: Path
    state: dict[str, Any]
    """agent.json."""
    agent: type[Agent]
    task: Task
    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    end_ids: tuple[int, ...]
    stop: tuple[str, ...]

    @property
    def is_lora(self) -> bool:
        return lora.is_lora(self.model)

    @property
    def is_seq2seq(self) -> bool:
        return bool(lora.bare(self.model).config.is_encoder_decoder)

    def budget(self, name: str) -> int:
        """max_prompt_tokens or max_new_tokens: the run's, or the task's where it named none."""
        given = self.state["env"].get(name)
        return int(getattr(self.task, name) if given is None else given)


def export(
    run: str | Path,
    to: str | Path,
    *,
    merge: bool = False,
    push: str | None = None,
    base_model: str | None = None,
    trust_code: bool = False,
) -> Path:
    """Write the model of a run's folder for other libraries; returns the folder.

    Args:
        run: a folder that an agent was saved in. Of what the run was trained with only the base of a LoRA is needed.
        to: a new or empty folder.
        merge: add a LoRA to the weights, so that no peft is needed to load it.
        push: also upload it to this repository of the Hub, a private one where it does not exist yet.
        base_model: where the base of a LoRA stands now, if it was moved.
        trust_code: import what the run's folder names, though it is not part of textrl-gym.

    Raises:
        ValueError: the folder is not empty; the run trained nothing; merge without a LoRA; a LoRA whose base has no
            name that others can load.
    """
    to, source = Path(to), Path(run)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ValueError(f"{str(to)!r} is not empty: name a new folder to export to")
    trained = read_trained(source, base_model, trust_code)
    if merge and not trained.is_lora:
        raise ValueError(f"--merge is for runs with a LoRA, and {str(source)!r} has none: leave it out")
    base = base_of(base_model or trained.state["model"])
    if trained.is_lora and not merge and base is None:
        raise ValueError("the base of this LoRA has no name under which others could load it: export it with --merge")
    generation = generation_config(trained)
    card = model_card(trained, _read_run(source), base, adapter=trained.is_lora and not merge)
    with loading.no_bars():
        _write_model(trained.model, to, merge, base)
        trained.tokenizer.save_pretrained(to)
        generation.save_pretrained(to)
    files.write_text(to / CARD, card)
    files.give_usual_modes(to)
    if push is not None:
        _push(to, push)
    return to


def read_trained(run: Path, base_model: str | None = None, trust_code: bool = False) -> Trained:
    """The model of a checkpoint, and what it wrote texts by.

    Raises:
        ValueError: the folder holds no checkpoint, or a damaged one; its agent trains nothing; another model stands
            where the base of its LoRA stood.
    """
    folder = files.whole_checkpoint(run)
    file = folder / files.STATE_FILE
    state = checkpoint.read_state(folder)
    with registry.named_by(file, trust_code):
        agent: Any = registry.load_agent_class(state["agent"])
        task = load_task(state["task"])
    if not (isinstance(agent, type) and issubclass(agent, Agent)):
        raise ValueError(f"{str(file)!r} names {state['agent']!r}, which is no agent")
    if not agent.trains:
        raise ValueError(f"{agent.__name__} trains nothing: there is no model of its own to export")
    model: Any = _load_model(folder, task, state, base_model)
    tokenizer = task.load_tokenizer(str(folder / "model"))
    chosen, settings = state["env"].get("eos_token_id"), state["env"]
    declared = [*loading.declared_ends(folder / "model"), *loading.declared_ends(model)]
    ends = encoding.end_ids(tokenizer, declared) if chosen is None else encoding.check_end_ids(tokenizer, chosen)
    return Trained(folder, state, agent, task, model, tokenizer, ends, stop_strings(settings.get("stop"), task.stop))


def _load_model(folder: Path, task: Task, state: dict[str, Any], base_model: str | None) -> Any:
    saved, own_base = folder / "model", folder / lora.BASE
    if not adapters.is_adapter(saved):
        return task.load_model(str(saved))
    if own_base.is_dir():
        return lora.load(task.load_model(str(own_base)).float(), saved)
    expected = dependencies.known(state, folder / files.STATE_FILE)["model"]
    base = dependencies.initial_model(folder, task, state["model"], expected, base_model)
    # As in training: a bfloat16 base would round what is added to it.
    return lora.load(task.load_model(base).float(), saved)


def base_of(name: str | None) -> str | None:
    """What a run started from, as other libraries can load it: a Hub id or an absolute path; None: no such name."""
    if name is None:
        return None
    if Path(name).is_dir():
        return str(Path(name).resolve())
    return name if "/" in name else None  # smollm2-135m, for one, is loaded from a package


def _write_model(model: Any, to: Path, merge: bool, base: str | None) -> None:
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


def generation_config(trained: Trained) -> GenerationConfig:
    """The model's own, with the ends of a turn and the budget that the run had."""
    bare: Any = lora.bare(trained.model)
    pad, vocabulary = trained.tokenizer.pad_token_id, vocab_size(trained.tokenizer)
    config: GenerationConfig = getattr(bare, "generation_config", None) or GenerationConfig()
    if bare.config.is_encoder_decoder:
        # Published ones have beams, least lengths and forced tokens in theirs, none of which the run had.
        config = GenerationConfig(decoder_start_token_id=packing.decoder_start(bare))
    config.eos_token_id = list(trained.end_ids)
    config.pad_token_id = pad if pad is not None else trained.end_ids[0]
    config.max_new_tokens, config.max_length = trained.budget("max_new_tokens"), None
    rows = bare.get_output_embeddings().weight.shape[0]
    # Rows beyond the tokenizer were never sampled in training, and mean nothing.
    if vocabulary < rows <= vocabulary + MOST_SUPPRESSED:
        config.suppress_tokens = list(range(vocabulary, rows))
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


def model_card(trained: Trained, run: Run | None, base: str | None, adapter: bool) -> str:
    """README.md of the exported folder, with the metadata that the Hub reads."""
    from huggingface_hub import ModelCardData

    name = trained.agent.__name__
    metadata = ModelCardData(
        base_model=base if base and not Path(base).is_dir() else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text2text-generation" if trained.is_seq2seq else "text-generation",
        tags=["textrl-gym", "reinforcement-learning", name.lower()],
    )
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {name} on {type(trained.task).__name__}",
        f"A language model trained with {name} by [textrl-gym](https://pypi.org/project/textrl-gym/).",
        "## Use",
        _use(trained, run, adapter),
        "## Training",
        _table(("", ""), _training(trained, base)),
        "## Evaluation",
        _evaluation(run),
        "## Settings",
        _table(("setting", "value"), _settings(trained.state["config"])),
    ]
    return "\n\n".join(parts) + "\n"


def _use(trained: Trained, run: Run | None, adapter: bool) -> str:
    prompts = [sample["prompt"] for sample in run.samples] if run else []
    prompt = next((one for one in prompts if len(one) <= MOST_PROMPT), "...")
    stops = f", stop_strings={list(trained.stop)!r}, tokenizer=tokenizer" if trained.stop else ""
    auto = "AutoModelForSeq2SeqLM" if trained.is_seq2seq else "AutoModelForCausalLM"
    # An encoder-decoder gives its completion alone.
    output = "output[0]" if trained.is_seq2seq else 'output[0, inputs["input_ids"].shape[1]:]'
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
    if trained.tokenizer.chat_template:
        notes.append("The tokenizer has a chat template: for conversations use `tokenizer.apply_chat_template`.")
    if trained.agent.play is not Agent.play:
        notes.append("In the run this agent decodes by a way of its own; here is the policy that it decodes with.")
    return "\n\n".join(["\n".join(lines), *notes])


def _training(trained: Trained, base: str | None) -> list[tuple[str, str]]:
    state, task = trained.state, trained.task
    settings, reward = state["env"], state["env"].get("reward")
    if reward is None:
        reward = "a function of Python" if "reward" in state["env_not_saved"] else task.reward
    where = state["config"].get("kl_in", trained.agent.kl_where)  # of GRPO and its relatives a setting says it
    place = f" in the {where}" if isinstance(where, str) else ""
    kl = f"{state['kl_coef']:g}{place}, estimator {settings.get('kl_estimator', 'k1')}"
    return [
        ("base model", _public(base or state["model"] or f"the model that {type(task).__name__} comes with")),
        ("environment", type(task).__name__),
        ("data", _public(settings.get("dataset") or "the environment's own prompts")),
        ("reward", _public(reward)),
        ("KL penalty", kl),
        (
            "prompt and completion, at most",
            f"{trained.budget('max_prompt_tokens')} and {trained.budget('max_new_tokens')} tokens",
        ),
        ("updates, tokens generated", f"{state['num_updates']:,}, {state['rng_state']['num_timesteps']:,}"),
        ("time", f"{sum(state['seconds'].values()):,.0f} s"),
        ("seed", str(state["seed"])),
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
