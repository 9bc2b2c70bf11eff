"""Conversations: read from the forms that data sets have, and put together with a system prompt and examples.

A conversation is an `encoding.Chat`, which the model's chat template writes. Where there is none, or is not to be, it
is written as Anthropic wrote theirs: "\\n\\nHuman: ...\\n\\nAssistant: ...".
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from textrl_gym.bounds import check
from textrl_gym.core import Row
from textrl_gym.data.encoding import Chat, write_chat
from textrl_gym.data.rows import BadRow, check_characters, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
ROLES = {"human": "user", "gpt": "assistant", "prompter": "user"}
"""What data sets call the roles of chat templates."""
_TURN = re.compile(r"(?:\r?\n\r?\n|^)(Human|Assistant):")
Template = Literal["auto", "chat", "none"]


@dataclasses.dataclass(frozen=True)
class ChatSettings:
    """How prompts become conversations."""

    template: Template = "auto"
    """auto: conversations are written by the tokenizer's chat template, texts letter for letter; chat: a text is what a
    user says; none: no chat template."""
    system_prompt: str | None = None
    """What stands before every conversation without a system message of its own; with it, or with examples, a text is
    what a user says."""
    few_shot: Chat = dataclasses.field(default_factory=Chat)
    """Messages behind the system message and before the rest of the conversation."""

    def __post_init__(self) -> None:
        check("template", self.template, Template)
        check("system_prompt", self.system_prompt, str | None)

    @property
    def key(self) -> Hashable:
        """Equal for equal settings."""
        return (self.template, self.system_prompt, json.dumps(self.few_shot))

    @property
    def wraps_texts(self) -> bool:
        """Whether a prompt that is a text becomes what a user says."""
        return self.template == "chat" or self.system_prompt is not None or bool(self.few_shot)


def user(text: str) -> Chat:
    """A conversation in which a user has said one thing."""
    return Chat([{"role": "user", "content": text}])


# -- reading ----------------------------------------------------------------------------------------------------------


def messages(turns: object) -> Chat:
    """A conversation of {"role", "content"} or {"from", "value"} turns; one turn may stand alone.

    Content may be a list of parts, {"type": "text", "text": ...}, which are joined.

    Raises:
        BadRow: a turn without a role or a text, or with another part than a text.
    """
    turns = [turns] if isinstance(turns, Mapping) else turns
    if not isinstance(turns, list | tuple) or not turns:
        raise BadRow("neither a text nor a list of turns", shown(turns))
    chat = Chat()
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise BadRow("no turn with role and content", shown(turn))
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if isinstance(content, list):
            content = "".join(_part(part) for part in content)
        if not isinstance(role, str) or not isinstance(content, str):
            raise BadRow("no turn with role and content", shown(turn))
        check_characters(content, "a turn")
        chat.append({"role": ROLES.get(role, role), "content": content})
    return chat


def _part(part: object) -> str:
    text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
    kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
    if not isinstance(text, str) or kind != "text":
        raise BadRow("a part of a turn is no text", shown(part))
    return text


def asked(turns: object) -> tuple[Chat, str | None]:
    """A conversation up to a user's turn, and the assistant's answer to it where it follows.

    Raises:
        BadRow: nothing is asked, or see `messages`.
    """
    chat, answer = messages(turns), None
    if chat[-1]["role"] == "assistant":
        answer = chat.pop()["content"]
    if not chat or chat[-1]["role"] == "assistant" or all(turn["role"] == "system" for turn in chat):
        raise BadRow("a conversation in which nothing is asked", shown(turns))
    return chat, answer


def answer_of(value: object) -> str:
    """A completion: a text, or one turn of the assistant.

    Raises:
        BadRow: it is neither.
    """
    if isinstance(value, str):
        check_characters(value, "column 'completion'")
        return value
    if not isinstance(value, list | Mapping):
        raise BadRow("column 'completion' is not a text", shown(value))
    turns = messages(value)
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise BadRow("column 'completion' is not one turn of the assistant", shown(value))
    return turns[0]["content"]


def dialogue(text: str) -> Chat | None:
    """The turns of a text in Anthropic's form, which ends where the assistant is to speak; None for another text."""
    if not text.rstrip().endswith("Assistant:") or _TURN.match(text) is None:
        return None
    # ["", role, text, role, text, ...]: the last is the empty beginning of the answer
    _, *parts = _TURN.split(text)
    turns = [
        {"role": "user" if role == "Human" else "assistant", "content": text.strip()}
        for role, text in zip(parts[:-2:2], parts[1:-2:2], strict=True)
    ]
    return Chat(turns) if turns and turns[-1]["role"] == "user" and not parts[-1].strip() else None


def read_few_shot(given: str | Path | Sequence[Mapping[str, Any]] | None) -> Chat:
    """Messages, or those that a JSON file lists.

    Raises:
        ValueError: they are no messages, or the file cannot be read.
    """
    if given is None:
        return Chat()
    name, turns = "few_shot", cast(Any, given)
    if isinstance(given, str | Path):
        name = f"few_shot {str(given)!r}"
        try:
            turns = json.loads(Path(given).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{name} is no JSON file of messages: {error}") from error
    try:
        return messages(list(turns) if isinstance(turns, tuple) else turns)
    except BadRow as error:
        raise ValueError(f"{name} must be a list of {{'role', 'content'}}: {error}") from error


def tools_of(row: Row) -> list[Any] | None:
    """The tools that a row's column `tools` lists, as chat templates take them; None where it lists none.

    Raises:
        BadRow: it is neither a list of objects nor JSON of one.
    """
    tools = value = row.get("tools")
    if isinstance(value, str):
        try:
            tools = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise BadRow("column 'tools' is no JSON", shown(value)) from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow("column 'tools' is no list of objects", shown(value))
    return tools


# -- writing ----------------------------------------------------------------------------------------------------------


def conversation(row: Row, tokenizer: PreTrainedTokenizerBase, settings: ChatSettings) -> Row:
    """The row with `chat`, the conversation that the chat template is to write, or with its text as `prompt`.

    A system message comes first and alone: the row's own, or else the settings'. The examples stand behind it. What has
    the settings' own messages already stays as it is: prompts that were written into a file (`as_data`) have them, and
    may be read with the same settings.

    Raises:
        BadRow: its tools are no list, where the chat template would write them.
    """
    chat = row.get("chat")
    if not isinstance(chat, Chat):
        if not settings.wraps_texts:
            return row
        chat = user(row["prompt"])
    whole = _whole(chat, settings)
    if settings.template != "none" and tokenizer.chat_template:
        return {**row, "chat": Chat(whole, tools_of(row))}
    as_it_is = whole == chat or _has_them(row["prompt"], settings)
    return {**row, "prompt": row["prompt"] if as_it_is else as_text(whole), "chat": None}


def _whole(chat: Chat, settings: ChatSettings) -> Chat:
    """A conversation behind its system message and the examples."""
    own, rest = _system(chat)
    system, examples = _system(settings.few_shot)
    if settings.system_prompt is not None:
        system = [{"role": "system", "content": settings.system_prompt}, *system]
    return Chat([*(own or system), *([] if rest[: len(examples)] == examples else examples), *rest])


def _system(turns: Chat) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The system messages that a conversation begins with, and its other turns."""
    first = next((n for n, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
    return turns[:first], turns[first:]


def _has_them(text: str, settings: ChatSettings) -> bool:
    """Whether a text is a conversation, as `as_text` writes it, behind a system message and the examples already."""
    system, examples = _system(settings.few_shot)
    head, there, _ = text.partition(as_text(examples).removesuffix(ASSISTANT) or HUMAN)
    if not there or not text.endswith(ASSISTANT):
        return False
    if not head:
        return settings.system_prompt is None and not system
    return head.startswith("\n\n") and not head.startswith((HUMAN, ASSISTANT))


def written(row: Row, tokenizer: PreTrainedTokenizerBase, settings: ChatSettings) -> Row:
    """The row as an environment has it: `prompt` is what the policy reads, also where the chat template wrote it.

    Raises:
        BadRow: the chat template refuses the conversation, or see `conversation`.
    """
    row = conversation(row, tokenizer, settings)
    chat = row.get("chat")
    if not isinstance(chat, Chat):
        return row
    return {**row, "prompt": write_chat(chat, tokenizer)}


def as_data(row: Row) -> str | list[dict[str, str]]:
    """A row's prompt as data sets have it: the messages of a conversation, or a text.

    Never the text that a chat template wrote: read back, the names of its special tokens would be letters.
    """
    chat = row.get("chat")
    prompt: str = row["prompt"]
    return list(chat) if isinstance(chat, Chat) else prompt


def tools_as_data(row: Row) -> dict[str, Any]:
    """A column beside `as_data` for the tools of a conversation that has any."""
    chat = row.get("chat")
    return {"tools": chat.tools} if isinstance(chat, Chat) and chat.tools else {}


def completion_as_data(row: Row, text: str) -> str | list[dict[str, str]]:
    """A completion beside `as_data`: of a conversation a turn of the assistant, else the text."""
    return [{"role": "assistant", "content": text}] if isinstance(row.get("chat"), Chat) else text


def as_text(chat: Sequence[Mapping[str, str]]) -> str:
    """A conversation as Anthropic wrote theirs, up to where the assistant is to speak."""
    names = {"user": f"{HUMAN} ", "assistant": f"{ASSISTANT} "}
    return "".join(names.get(turn["role"], "\n\n") + turn["content"] for turn in chat) + ASSISTANT
