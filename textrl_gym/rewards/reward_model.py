"""reward_model: the score of a learned reward model, any sequence classifier of transformers with one label.

A reward model of this project is a folder: the model, its tokenizer, and reward_model.json with the normalisation
{"bias": b, "scale": s}: score = (raw - b) * s. It was trained on prompt + completion + EOS, a truncated completion
having no EOS. Any other classifier is scored on the plain text, with b = 0 and s = 1.

Where the model's tokenizer is the environment's own, its token ids are scored as they were generated: decoding and
encoding again may give other tokens. Else the text is encoded with the model's tokenizer: the prompt as far as the
policy read it, since a longer one is cut for the policy too. What is still longer than the model has positions loses
the end of the prompt's body, never the completion.

Shape legend: B rows (of the micro-batch), S places, D width.
"""

from __future__ import annotations

import bisect
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from textrl_gym.data.chat import as_text
from textrl_gym.data.encoding import Chat, codec, cut_beginning
from textrl_gym.functional import pad
from textrl_gym.models import loading, positions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NORMALISATION_FILE = "reward_model.json"
MAX_BATCH_TOKENS = 16384
"""Places in one micro-batch, padding included."""


class TokenizerOwner(Protocol):
    """What a reward needs of a task (`textrl_gym.mdp.task.Task` is one) where no tokenizer is given."""

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The task's own tokenizer."""
        ...


class CutTextWarning(UserWarning):
    """A reward model reads less than the policy did, since its positions end."""


class RewardModel:
    """Scores of whole episodes under a sequence classifier; a callable of TRL's signature."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        bias: float = 0.0,
        scale: float = 1.0,
        appends_eos: bool = False,
        env_tokenizer: PreTrainedTokenizerBase | None = None,
        keep_suffix: str = "",
    ) -> None:
        """Wrap a loaded classifier.

        Args:
            model: a sequence classifier of transformers with one label, in eval mode, on its device.
            tokenizer: the model's own.
            bias: subtracted from the raw value.
            scale: multiplied with it then.
            appends_eos: the model was trained on texts that end in EOS; matters only where texts are encoded here.
            env_tokenizer: the tokenizer of the ids in the columns `prompt_ids` and `completion_ids`; None: unknown, so
                that texts are encoded here.
            keep_suffix: the end of every prompt that is not cut, as of a Task.

        Raises:
            ValueError: the model has not one label, or fewer rows than the tokenizer has tokens.
        """
        # Here: its imports take two seconds, and making an environment must not wait for them.
        from textrl_gym.policy.backbone import Trunk

        config: Any = model.config
        if config.num_labels != 1:
            raise ValueError(f"a reward model has one label, this {type(model).__name__} has {config.num_labels}")
        loading.check_vocab(tokenizer, model)
        config.use_cache = False  # nothing is generated: keys and values of every layer would be kept for nothing
        self.model: Any = model
        self.decodes = hasattr(model, "score") and not config.is_encoder_decoder
        """Whether the score is a linear function of a decoder's hidden state at the last token."""
        self.trunk = Trunk(model)
        self.tokenizer = tokenizer
        self.bias, self.scale = bias, scale
        self.appends_eos = appends_eos
        self.env_tokenizer, self.keep_suffix = env_tokenizer, keep_suffix
        own = (positions.limit(model), positions.stated(config), self.tokenizer.model_max_length)
        self.limit = int(min(number for number in own if number is not None))
        """Tokens of the longest text that it takes."""
        self._said_cut = self._said_apart = False
        # Ids mean the same where the vocabularies are equal; how a text is split into them does not matter here.
        self.shares_tokenizer = env_tokenizer is not None and env_tokenizer.get_vocab() == tokenizer.get_vocab()

    def __call__(
        self,
        prompts: list[str],
        completions: list[str],
        prompt_ids: list[list[int]] | None = None,
        completion_ids: list[list[int]] | None = None,
        chat: list[Any] | None = None,
        **columns: list[Any],
    ) -> Tensor:
        """Normalised scores, float32 [B] on the CPU.

        A conversation (`chat`) is written by the chat template of the model's own tokenizer, where it has one: the
        prompts' text is that of the policy's.
        """
        if self.shares_tokenizer and prompt_ids is not None and completion_ids is not None:
            shown = [self._cut_ids(p, self.limit - len(c)) for p, c in zip(prompt_ids, completion_ids, strict=True)]
            sequences = [p + c for p, c in zip(shown, completion_ids, strict=True)]
            return self.score_ids(sequences, [len(ids) for ids in shown])
        if prompt_ids is not None:
            prompts = [self._read(prompt, ids) for prompt, ids in zip(prompts, prompt_ids, strict=True)]
        ends = [[] for _ in completions] if completion_ids is None else completion_ids
        chats = [None for _ in completions] if chat is None else chat
        sequences = [
            self._conversation(spoken, completion, ids)
            if isinstance(spoken, Chat)
            else self._encode(prompt, completion, ids)
            for spoken, prompt, completion, ids in zip(chats, prompts, completions, ends, strict=True)
        ]
        return self.score_ids(sequences)

    def scoring_models(self) -> list[nn.Module]:
        """The model."""
        return [self.model]

    def _conversation(self, chat: Chat, completion: str, completion_ids: list[int]) -> list[int]:
        """Ids of a conversation and its answer, the beginning cut off where it is longer than the model's positions."""
        if not self.tokenizer.chat_template:
            space = "" if completion[:1].isspace() else " "
            return self._encode(as_text(chat), space + completion, completion_ids)
        text_codec = codec(self.tokenizer)
        if self.appends_eos and self._is_cut_off(completion_ids):  # it was trained on those without an end
            ids = [*text_codec.chat(chat), *text_codec.behind(completion, unknown="skip")]
        else:
            whole = Chat([*chat, {"role": "assistant", "content": completion}], chat.tools)
            ids = text_codec.chat(whole, answered=True)
        if len(ids) > self.limit:
            self._say_cut(len(ids), "the beginning of the conversation")
        return cut_beginning(ids, self.tokenizer, self.limit)

    def _is_cut_off(self, completion_ids: list[int]) -> bool:
        """Whether an episode has no end. A text without ids, or with those of an unknown tokenizer, is finished."""
        if not completion_ids or self.env_tokenizer is None:
            return False
        return completion_ids[-1] not in codec(self.env_tokenizer).control

    def _read(self, prompt: str, ids: list[int]) -> str:
        """A prompt as far as the policy read it."""
        if self.env_tokenizer is None:
            return prompt
        text_codec = codec(self.env_tokenizer)
        # A text that fits is itself; decoding may give other spaces.
        whole = text_codec.encode(prompt, begin=True, unknown="skip")
        return prompt if len(ids) >= len(whole) else text_codec.decode(ids, begin=True)

    def _encode(self, prompt: str, completion: str, completion_ids: list[int]) -> list[int]:
        """Ids of an episode's text in the model's own tokens, cut to its positions."""
        ids = self._ids(prompt + completion, completion_ids)
        if len(ids) <= self.limit:
            return ids
        self._say_cut(len(ids))
        suffix = self.keep_suffix if prompt.endswith(self.keep_suffix) else ""
        body = prompt.removesuffix(suffix)

        def cut(size: int) -> list[int]:
            return self._ids(body[:size] + suffix + completion, completion_ids)

        # By characters: a tokenizer may merge over any cut, so that tokens cannot be counted apart.
        size = bisect.bisect_right(range(len(body)), self.limit, key=lambda n: len(cut(n)))
        while size > 0 and len(cut(size)) > self.limit:
            size -= 1
        return cut(size)

    def _ids(self, text: str, completion_ids: list[int]) -> list[int]:
        """Ids of a text in the model's own tokens, with EOS where the model expects it and the episode had one."""
        ids = codec(self.tokenizer).encode(text, begin=True, unknown="skip")
        if self.appends_eos and not self._is_cut_off(completion_ids) and ids[-1:] != [self.tokenizer.eos_token_id]:
            ids = [*ids, self.tokenizer.eos_token_id]
        return ids

    def _cut_ids(self, ids: list[int], room: int) -> list[int]:
        """A prompt's ids, of which so many have room: its body loses its end."""
        if len(ids) <= room:
            return ids
        self._say_cut(len(ids) + self.limit - room)
        suffix = codec(self.tokenizer).behind(self.keep_suffix, unknown="skip") if self.keep_suffix else []
        suffix_length = len(suffix) if suffix and ids[-len(suffix) :] == suffix else 0
        return ids[: max(room - suffix_length, 0)] + ids[len(ids) - suffix_length :]

    def _say_cut(self, length: int, lost: str = "the end of the prompt's body") -> None:
        if not self._said_cut:
            self._said_cut = True
            name = type(self.model).__name__
            warnings.warn(
                f"the reward model ({name}) takes texts of at most {self.limit} tokens, and a prompt with its "
                f"completion has {length}: {lost} is left out",
                CutTextWarning,
                stacklevel=3,
            )

    @torch.inference_mode()
    def score_ids(self, sequences: list[list[int]], prompt_lengths: list[int] | None = None) -> Tensor:
        """Normalised scores of N token sequences (prompt and completion), float32 [N] on the CPU.

        They are scored in micro-batches of similar lengths, which changes nothing but the time: padding is masked.
        Where it is known how many tokens of each sequence are its prompt, a decoder computes each prompt once.

        Raises:
            ValueError: a sequence is empty, or longer than the model has positions.
        """
        for row, ids in enumerate(sequences):
            if not 0 < len(ids) <= self.limit:
                raise ValueError(f"row {row} has {len(ids)} tokens; the reward model takes 1 to {self.limit}")
        rows_of = range(len(sequences))
        apart = self.decodes and not self._depends_on_the_past_alone(max(map(len, sequences), default=1))
        if prompt_lengths is None or min(prompt_lengths, default=0) == 0 or not self.decodes or apart:
            order = sorted(rows_of, key=lambda row: len(sequences[row]))
            all_rows = sequence_batches(sequences, order, 1) if apart else sequence_batches(sequences, order)
            batches = [self._raw([sequences[row] for row in rows]) for rows in all_rows]
        else:
            parts = [(ids[:n], ids[n:]) for ids, n in zip(sequences, prompt_lengths, strict=True)]
            order = sorted(rows_of, key=lambda row: (len(parts[row][0]), parts[row][0]))  # a prompt's rows together
            batches = [self._raw_parts([parts[row] for row in rows]) for rows in sequence_batches(sequences, order)]
        sorted_N = torch.cat(batches).cpu() if batches else torch.zeros(0)
        raw_N = torch.empty_like(sorted_N)
        raw_N[torch.tensor(order, dtype=torch.int64)] = sorted_N
        return (raw_N - self.bias) * self.scale

    def _depends_on_the_past_alone(self, length: int) -> bool:
        """Whether what a decoder says of a token is the same whatever follows, padding and longer rows included."""
        # What a policy must be; a reward model that is not is read a whole text at a time.
        try:
            self.trunk.try_out(length)
        except ValueError as reason:
            if not self._said_apart:
                self._said_apart = True
                warnings.warn(f"rewards are computed a text at a time: {reason}", stacklevel=3)
            return False
        return True

    def _raw(self, sequences: list[list[int]]) -> Tensor:
        """The classifier's values of one micro-batch, float32 [B] on the model's device."""
        longest = max(map(len, sequences))
        pad = self.tokenizer.pad_token_id or 0  # any id does for a decoder; an encoder may read positions off its own
        device = self.model.device
        ids_BS = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in sequences], device=device)
        length_B = torch.tensor([len(ids) for ids in sequences], device=device)
        # Padding stands on the right, so the model's own position ids are right (RoBERTa's do not start at 0).
        mask_BS = (torch.arange(longest, device=device) < length_B[:, None]).long()
        if self.decodes:
            # Its own pooling finds the last token by pad_token_id, which may be unset or equal EOS.
            hidden_BSD = self.model.base_model(input_ids=ids_BS, attention_mask=mask_BS)[0]
            last_BD = hidden_BSD[torch.arange(len(sequences), device=device), length_B - 1]
            return self.model.score(last_BD).squeeze(1).float()
        return self.model(input_ids=ids_BS, attention_mask=mask_BS).logits.squeeze(1).float()

    def _raw_parts(self, parts: list[tuple[list[int], list[int]]]) -> Tensor:
        """`_raw` of prompts and completions, each different prompt computed once."""
        device = self.model.device
        prompt_BP, prompt_mask_BP = (tensor.to(device) for tensor in pad([prompt for prompt, _ in parts], "left"))
        token_BT, mask_BT = (tensor.to(device) for tensor in pad([completion for _, completion in parts], "right"))
        hidden_BXD = self.trunk.hidden(prompt_BP, prompt_mask_BP, token_BT, mask_BT)  # X = T + 1
        last_BD = hidden_BXD[torch.arange(len(parts), device=device), mask_BT.sum(1)]
        return self.model.score(last_BD).squeeze(1).float()

    def save(self, folder: str | Path) -> None:
        """Write the model (safetensors), its tokenizer and the normalisation, for `"reward_model:FOLDER"`."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        text = json.dumps({"bias": self.bias, "scale": self.scale}, indent=2)
        (Path(folder) / NORMALISATION_FILE).write_text(text + "\n", encoding="utf-8")


def sequence_batches(sequences: list[list[int]], order: list[int], limit: int = MAX_BATCH_TOKENS) -> list[list[int]]:
    """Rows, in the given order by rising length, in batches of at most `limit` places (or of one row)."""
    batches: list[list[int]] = []
    for row in order:
        if batches and (len(batches[-1]) + 1) * len(sequences[row]) <= limit:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


class Bundled:
    """A task's own reward model, read at the first score: making an environment must not wait for its modules."""

    def __init__(self, load: Callable[[], RewardModel]) -> None:
        self._load = load
        self._model: RewardModel | None = None

    @property
    def loaded(self) -> RewardModel:
        """The reward model, which the first call loads."""
        if self._model is None:
            self._model = self._load()
        return self._model

    def scoring_models(self) -> list[nn.Module]:
        """The model, which is loaded by this at the latest."""
        return self.loaded.scoring_models()

    def __call__(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> Tensor:
        """Normalised scores, float32 [B] on the CPU."""
        return self.loaded(prompts, completions, **columns)


def make(
    argument: str | None,
    *,
    task: TokenizerOwner | None,
    device: str | torch.device,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype = torch.float32,
) -> RewardModel | Bundled:
    """The reward model of a folder or Hub id; without an argument the task's own, which is loaded when first needed.

    The name of a folder that stands beside the task's own reward model is another of the task's.

    Raises:
        ValueError: the task has no reward model, or none can be loaded.
    """
    own = getattr(task, "reward_model_path", None)
    source = argument or own
    if argument and own and not Path(argument).expanduser().is_dir():
        beside = Path(own).parent / argument
        source = str(beside) if (beside / NORMALISATION_FILE).is_file() else argument
    if not source:
        raise ValueError(
            f"task {type(task).__name__} has no reward model of its own: name one as reward_model:FOLDER (or a Hub "
            "id), or choose another reward"
        )
    if tokenizer is None and task is not None:
        tokenizer = task.load_tokenizer()

    def load_it() -> RewardModel:
        keep = getattr(task, "keep_suffix", "")
        return load_reward_model(source, device=device, env_tokenizer=tokenizer, dtype=dtype, keep_suffix=keep)

    if argument is None and (Path(source) / NORMALISATION_FILE).is_file():
        return Bundled(load_it)
    return load_it()


def load_reward_model(
    source: str,
    *,
    device: str | torch.device,
    env_tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype = torch.float32,
    keep_suffix: str = "",
) -> RewardModel:
    """The reward model of a folder or Hub id, with the normalisation that the folder holds.

    Raises:
        ValueError: none can be loaded.
    """
    own = loading.load_tokenizer(source, ends=False)  # another project's classifier may have no EOS
    model = loading.load_classifier(source, device=device, dtype=dtype)
    normalisation = read_normalisation(Path(source).expanduser() / NORMALISATION_FILE)
    if normalisation and own.eos_token_id is None:
        raise ValueError(f"the tokenizer of {source!r} has no EOS token, which the reward model was trained to read")
    return RewardModel(model, own, **normalisation, env_tokenizer=env_tokenizer, keep_suffix=keep_suffix)


def read_normalisation(path: Path) -> dict[str, Any]:
    """The keywords of RewardModel that a reward_model.json stands for; none where there is no such file."""
    if not path.is_file():
        return {}
    # Exactly these keys: a bias under another name would silently be 0, and the KL coefficient is tuned to scores of
    # standard deviation 1.
    numbers = json.loads(path.read_text(encoding="utf-8"))
    if set(numbers) != {"bias", "scale"} or not all(
        isinstance(v, int | float) and math.isfinite(v) for v in numbers.values()
    ):
        raise ValueError(f'{str(path)!r} must hold {{"bias": number, "scale": number}}, it holds {numbers}')
    return {**numbers, "appends_eos": True}
