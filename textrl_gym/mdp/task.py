"""Task: what one text task adds to the token MDP. A file in envs/ holds one subclass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from textrl_gym import files, registry
from textrl_gym.bounds import shown
from textrl_gym.core import Message, PromptSource, Reply, RewardSpec, Row
from textrl_gym.data import chat, encoding, prompts
from textrl_gym.data.chat import ChatSettings
from textrl_gym.data.rows import (
    CHECKED_AT_ONCE,
    BadRow,
    Kept,
    OnBadRows,
    RowReport,
    RowRules,
    Rows,
    row_rules,
    say_once,
    settle,
    text_of,
)
from textrl_gym.worlds.lesson import Lesson

if TYPE_CHECKING:  # a list of environments is read without torch
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase


class Task:
    """Prompts, budgets, and the default model and reward of one environment id.

    A file in envs/ holds one subclass and the line `ID = "Name-v0"`. A task of your own, anywhere, is registered with
    `textrl_gym.register("Mine-v0", "my_module:MyTask")` or given as `TextEnv(task=MyTask())`.
    """

    id: ClassVar[str] = ""
    max_prompt_tokens: int = 256
    max_new_tokens: int = 48
    model: str = ""
    """The language model that agents start from: a folder, a Hub id, or "smollm2-135m"."""
    reward: RewardSpec = "reward_model"
    gold: RewardSpec | None = None
    """The reward that `evaluate` reports beside the training reward; never trained on unless asked for."""
    gold_of_dataset: RewardSpec | None = None
    """The gold score of rows that `dataset=` gives, which may lack the columns that `gold` needs; None: none."""
    best_gold: float | None = None
    """The best gold score that is known, which is 1 on the scale of a comparison over tasks; None: what is reached."""
    gold_scale: tuple[float, float] | None = None
    """The least and the largest gold score of the embedded prompts, where intervals of it end; None: not known."""
    kl_coef: float = 0.05
    """The per-token KL coefficient that agents start with on this task."""
    stop: tuple[str, ...] = ()
    lesson: Lesson | None = None
    """What the task shows about RL from feedback; `textrl-gym lesson ENV` runs it."""
    critic: str | None = None
    """module:Class of a rule-based critic of the embedded prompts, made of its `CriticErrors`; it stands for a language
    model in `textrl-gym constitutional` (`feedback.critics`). None: there is none."""
    recipe: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """How the embedded models were made (`pipeline.build_assets`): the settings of "fluent" (with "references", the
    rows that it may see) and "policy", and those of
    each reward model by the name of its folder."""
    symbols: ClassVar[tuple[str, ...]] = ()
    """The words of the embedded model's tokenizer (`models.tiny.symbol_tokenizer`), where each word is one token; none:
    it is trained on the task's texts."""
    keep_suffix: str = ""
    """The end of every prompt that cutting must not touch, such as "\\n\\nTL;DR:"."""
    max_turns: int = 8
    """Of the agent, where the task defines `reply`; max_new_tokens then counts all turns and all replies."""
    max_turn_tokens: int | None = None
    """The token budget of each turn; None: what is left of max_new_tokens."""
    turn_markers: tuple[str, str] = (f"{chat.HUMAN} ", chat.ASSISTANT)
    """What stands before and behind a reply where prompts are texts. Where they are conversations it is what the chat
    template writes there."""
    ends_conversation: tuple[str, ...] = ()
    """Names of special tokens by which the agent ends the whole conversation; others end its turn."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for old, new in {"judge": "gold", "falsified": "corrupted"}.items():
            if old in vars(cls):  # of version 0.1; it would be ignored in silence
                raise TypeError(f"{cls.__name__}.{old} is called {new} since version 0.2: rename it")
        if "load_model" in vars(cls):
            cls.load_model = _checked(cls.load_model)  # type: ignore[method-assign]

    def rows(self, split: str, dataset: str | None = None) -> PromptSource:
        """The prompts of a split: embedded where dataset is None, else a Hub id or a local file or folder."""
        raise ValueError(f"{type(self).__name__} defines no rows(split, dataset)")

    def references(self, split: str) -> PromptSource:
        """What a competent model learns before the embedded policy is made of it (`recipe`)."""
        return self.rows(split)

    def appeal(self, row: Row, text: str) -> float:
        """What a text seems worth to annotators beyond its gold score: a bias that they have, in units of gold."""
        return 0.0

    def measures(self, rows: Sequence[Row], completions: Sequence[str]) -> dict[str, float]:
        """Numbers of the task's own about completions of its embedded rows, which evaluations report too."""
        return {}

    def reply(self, row: Row, turns: Sequence[Message]) -> Reply:
        """What the environment answers to the agent's last turn. A task that defines it is a conversation.

        Args:
            row: of the prompt.
            turns: what was said behind the prompt so far, {"role": "assistant" (the agent) or "user", "content"}; the
                last is the agent's. The reply must be a function of these two: both drivers ask for it.
        """
        raise ValueError(f"{type(self).__name__} defines no reply(row, turns): it has a single turn")

    def replies(self, rows: Sequence[Row], turns: Sequence[Sequence[Message]]) -> list[Reply]:
        """The replies to several conversations, for tasks whose other side answers many at once."""
        return [self.reply(row, of_row) for row, of_row in zip(rows, turns, strict=True)]

    @property
    def replies_to_turns(self) -> bool:
        """Whether the task is a conversation."""
        return type(self).reply is not Task.reply or type(self).replies is not Task.replies

    def load_tokenizer(self, name: str | None = None) -> PreTrainedTokenizerBase:
        """The tokenizer `name` (Hub id, folder), or the task's own."""
        from textrl_gym.models import loading

        return loading.load_tokenizer(name or self.model)  # a model's folder holds its tokenizer too

    def load_model(
        self, name: str | None = None, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> nn.Module:
        """The causal LM `name` of transformers (Hub id, folder), or the task's own, in eval mode.

        The folder may hold a LoRA adapter of peft, or be one that an agent was saved to.
        """
        from textrl_gym.models import loading

        spec = name or self.model
        return loading.load_model(spec, device=device, dtype=dtype, base=checkpoint_base(spec))

    def encode(self, row: Row, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int) -> list[int]:
        """Token ids of a row's prompt, at most max_prompt_tokens; a longer prompt is cut at the end of its body.

        A conversation, the row's `chat` (textrl_gym.data.encoding.Chat), is written by the tokenizer's chat template.

        Raises:
            ValueError: the prompt is too long and its kept suffix leaves no room for any of the body.
        """
        if isinstance(row.get("chat"), encoding.Chat):
            return prompts.encode_conversation(row["chat"], tokenizer, max_prompt_tokens, self.keep_suffix)
        return prompts.encode_prompt(row["prompt"], tokenizer, max_prompt_tokens, self.keep_suffix)

    def check_prompts(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int
    ) -> list[BadRow | None]:
        """Why each row can give no prompt; None: it can."""
        if type(self).encode is Task.encode:
            budget = (tokenizer, max_prompt_tokens, self.keep_suffix)
            spoken = [isinstance(row.get("chat"), encoding.Chat) for row in rows]
            of_texts = prompts.uncuttable([r["prompt"] for r, s in zip(rows, spoken, strict=True) if not s], *budget)
            of_chats = prompts.unspeakable([r["chat"] for r, s in zip(rows, spoken, strict=True) if s], *budget)
            return [(of_chats if s else of_texts).pop(0) for s in spoken]
        faults: list[BadRow | None] = []
        for row in rows:
            try:
                self.encode(row, tokenizer, max_prompt_tokens)
                faults.append(None)
            except ValueError as error:
                faults.append(prompts.unencodable(error))
        return faults


def _checked(load_model: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """A task's own load_model, held to give the model that it is asked for.

    One that gave its own whatever the name would take the place of what was trained, when that is loaded again.
    """

    @functools.wraps(load_model)
    def checked(self: Task, name: str | None = None, **settings: Any) -> nn.Module:
        model = load_model(self, name, **settings)
        if name is None:
            return model
        from textrl_gym.models import weights

        folder, other = Path(name).expanduser(), None
        if folder.is_dir():
            is_run = (folder / files.STATE_FILE).is_file()
            other = weights.differs(model, files.whole_checkpoint(folder) / "model" if is_run else folder)
        elif "/" in str(name) and getattr(model, "name_or_path", None) == "":  # a Hub id, and a model of no file
            other = "made in code"
        if other is not None:
            raise ValueError(
                f"{type(self).__name__}.load_model({name!r}) gave another model than that ({other}): where a name is "
                "given, return super().load_model(name, **kwargs)"
            )
        return model

    return checked


class PromptReader:
    """Rows as one model is given them; equal for the same objects, so that data are read once.

    Args:
        task: says how prompts are encoded.
        chat_settings: how they become conversations.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_tokens: int,
        chat_settings: ChatSettings | None = None,
    ) -> None:
        self.task, self.tokenizer, self.max_prompt_tokens = task, tokenizer, max_prompt_tokens
        self.chat_settings = chat_settings or ChatSettings()

    def __call__(self, rows: Sequence[Row]) -> list[BadRow | None]:
        """What is wrong with each row, as it is in the data."""
        # Writing a conversation takes longer than all else, and the task's own check does without it.
        own = type(self.task).encode is Task.encode
        prepare = chat.conversation if own else chat.written
        fault_of: list[BadRow | None] = [None] * len(rows)
        whole: list[tuple[int, Row]] = []
        for place, row in enumerate(rows):
            try:
                text_of(row, "prompt")
                whole.append((place, prepare(row, self.tokenizer, self.chat_settings)))
            except BadRow as bad:
                fault_of[place] = bad
        faults = self.task.check_prompts([row for _, row in whole], self.tokenizer, self.max_prompt_tokens)
        for (place, _), fault in zip(whole, faults, strict=True):
            fault_of[place] = fault
        return fault_of

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PromptReader) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        return (id(self.task), id(self.tokenizer), self.max_prompt_tokens, self.chat_settings.key)


class WrittenRows(Sequence[Row]):
    """Rows with their prompts as a model reads them."""

    def __init__(self, source: PromptSource, reader: PromptReader) -> None:
        self.source, self.reader = source, reader

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Any, /) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return chat.written(self.source[index], self.reader.tokenizer, self.reader.chat_settings)


def checked_rows(
    task: Task,
    split: str,
    dataset: str | None,
    bad_rows: OnBadRows = "stop",
    reader: PromptReader | None = None,
) -> PromptSource:
    """A task's rows as a model is given them, each looked at before work begins.

    Rows that a task computes, as the embedded ones, are taken as they are; all others are read from data, or are a
    list.

    Args:
        bad_rows: what to do with those that cannot be prompts: "stop" or "skip".
        reader: the model's; None: they stay as they are in the data, and only their columns are looked at.

    Raises:
        ValueError: no rows, or bad ones.
    """
    with row_rules(RowRules(bad_rows, reader)):
        source = task.rows(split, dataset)
    where = f"{type(task).__name__}.rows({split!r}, {dataset!r})"
    _require_rows(source, where)
    if len(source) == 0:
        raise ValueError(f"dataset {dataset!r} has no rows in split {split!r}")
    if reader is None:
        return source
    if not isinstance(source, list | tuple):
        _say_texts(source, dataset, reader)
        # Computed texts are as the model reads them; conversations may meet a model without a chat template.
        as_they_are = not isinstance(source, Rows) and not isinstance(source[0].get("chat"), encoding.Chat)
        return source if as_they_are and not reader.chat_settings.wraps_texts else WrittenRows(source, reader)
    report = RowReport(len(source))
    good_places = []
    for first in range(0, len(source), CHECKED_AT_ONCE):
        faults = reader(source[first : first + CHECKED_AT_ONCE])
        for place, fault in enumerate(faults, start=first):
            if fault is None:
                good_places.append(place)
            else:
                report.add(f"row {place}", fault)
    settle(report, where, bad_rows)
    return WrittenRows(source if len(good_places) == len(source) else Kept(source, good_places), reader)


def _require_rows(source: object, where: str) -> None:
    """Raise ValueError where rows are no sequence of dicts; those of a list are looked at one by one elsewhere."""
    words = f"{where} must return a list of rows, each a dict with 'prompt', got"
    if isinstance(source, str | Mapping) or not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        raise ValueError(f"{words} {shown(source)}")
    if not isinstance(source, list | tuple) and len(source) and not isinstance(source[0], Mapping):
        raise ValueError(f"{words} {shown(source[0])} as the first row")


def _say_texts(source: PromptSource, dataset: str | None, reader: PromptReader) -> None:
    """Say once that a model with a chat template is given texts letter for letter."""
    settings = reader.chat_settings
    if dataset is None or settings.template != "auto" or settings.wraps_texts or not reader.tokenizer.chat_template:
        return
    if not isinstance(source[0].get("chat"), encoding.Chat):
        say_once(
            f"dataset {dataset!r} has texts as prompts, which the model is given letter for letter; "
            'template="chat" (--env.template chat) makes them what a user says, by the model\'s chat template'
        )


def load_task(task: Task | type[Task] | str) -> Task:
    """A Task from an instance, a subclass, "module:Class", or a module that defines one subclass."""
    loaded: object = task
    if isinstance(task, str):
        # A file of envs/ holds one class with rows(); a user's module may hold several, so that one is named.
        loaded = registry.load_object(task) if ":" in task else registry.class_in(registry.import_named(task), "rows")
    # Before it is called: a checkpoint could name any class.
    if not (isinstance(loaded, Task) or (isinstance(loaded, type) and issubclass(loaded, Task))):
        raise ValueError(f"{task!r} is no subclass or instance of textrl_gym.Task")
    return loaded() if isinstance(loaded, type) else loaded


def load_env_task(env_id: str) -> Task:
    """The task of a registered environment id ("TLDRSummarize-v0", or module:ID).

    Raises:
        ValueError: there is no such environment of text.
    """
    env_id = registry.find_env(env_id)  # first: it may register the id
    return load_task(registry.text_envs()[env_id])


def checkpoint_base(spec: str | Path) -> str | nn.Module | None:
    """What the LoRA in an agent's checkpoint stands on; None where spec is no LoRA of a checkpoint.

    Args:
        spec: the checkpoint's folder, or the folder in it that holds the LoRA.
    """
    from textrl_gym.models import adapters, fingerprint, lora

    given = Path(spec).expanduser()
    folder = given if (given / files.STATE_FILE).is_file() else given.parent
    # Without agent.json it is peft's own folder, which names its base itself.
    if not given.is_dir() or not (folder / files.STATE_FILE).is_file():
        return None
    folder = files.whole_checkpoint(folder)
    if not adapters.is_adapter(folder / "model"):
        return None
    if (folder / lora.BASE).is_dir():
        return str(folder / lora.BASE)
    state = files.read_state(folder)
    files.check_fields(state, folder / files.STATE_FILE, {"task": (str,), "model": (str, type(None))})
    if state["model"] is not None:
        known = state.get("fingerprints")
        return fingerprint.locate(state["model"], folder, known.get("model") if isinstance(known, dict) else None)
    with registry.named_by(folder / files.STATE_FILE, trust=False):
        return load_task(state["task"]).load_model()
