"""Conversations: turns of a request and an answer, or, where turns do not say all, messages for a chat template."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from lowrank_cli.data.records import kind_of
from lowrank_cli.errors import UsageError
from lowrank_cli.foreign import parse_json

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
# keys of a message by which data sets say whether it is learned; the other ones weigh or mask in ways of their own
_LEARNED = ("weight", "train", "loss")
_UNREAD = ("mask", "loss_mask", "loss_scale", "loss_weight", "training", "train_detail", "images", "videos", "audios")
# what an assistant says beside its content
SAID = ("tool_calls", "reasoning_content", "reasoning", "thinking")
_MESSAGES = "write them as messages of system, user, assistant and tool"


@dataclass(frozen=True)
class Turn:
    """A request and its answer.

    Attributes:
        instruction: what is asked.
        input: what the instruction is about, "" if there is none.
        response: the answer.
        learned: whether there is a loss on the answer; without it is context for the next one.
    """

    instruction: str
    input: str
    response: str
    learned: bool = True


@dataclass(frozen=True)
class Chat:
    """A conversation that only a chat template can write.

    Attributes:
        messages: as `apply_chat_template` takes them.
        learned: the numbers of the answers with a loss; the last message is one.
        tools: as `apply_chat_template` takes them; () if there are none.
        why: what of it has no place in turns.
    """

    messages: tuple[dict[str, Any], ...]
    learned: tuple[int, ...]
    tools: tuple[dict[str, Any], ...] = ()
    why: str = ""


@dataclass(frozen=True)
class Record:
    """A conversation.

    Attributes:
        where: its place for messages, such as "a.jsonl, line 3".
        turns: at least one, unless there is a chat.
        system: what a conversation says of the assistant before its first turn.
        choices: the answers that the question allows, where they are a closed set; the response is one of them.
        chat: the whole conversation instead of turns and system, where these do not say all of it.
    """

    where: str
    turns: tuple[Turn, ...]
    system: str = ""
    choices: tuple[str, ...] = ()
    chat: Chat | None = None

    @property
    def prompt(self) -> str:
        """Return what is asked, without answers; records of one prompt must not part into train and validation."""
        if self.chat is not None:
            asked = [message for message in self.chat.messages if message["role"] != "assistant"]
            return json.dumps([asked, self.chat.tools], sort_keys=True, default=str)
        return "\n".join(chain([self.system], *((turn.instruction, turn.input) for turn in self.turns)))

    def as_chat(self) -> Chat:
        """Return the conversation as messages, an instruction's input under it."""
        if self.chat is not None:
            return self.chat
        messages = [{"role": "system", "content": self.system}] if self.system else []
        learned = []
        for turn in self.turns:
            request = "\n\n".join(text for text in (turn.instruction, turn.input) if text)
            messages += [{"role": "user", "content": request}, {"role": "assistant", "content": turn.response}]
            learned += [len(messages) - 1] if turn.learned else []
        return Chat(tuple(messages), tuple(learned))


def read_conversation(record: dict[str, Any], key: str, where: str) -> Record:
    """Read a record of messages, with the system text and the tools that may stand beside them.

    Answers of weight 0 and those before the first request are context, and what follows the last learned answer is
    left out.

    Args:
        record: the whole one.
        key: of its messages.
        where: its place for messages.
    Raises:
        UsageError: it cannot be read as a conversation, or nothing of it is learned.
    """
    raw = record[key]
    if not isinstance(raw, list) or not all(isinstance(message, dict) for message in raw):
        raise UsageError(f"{where}: '{key}' is {kind_of(raw)}, not a list of messages", _MESSAGES)
    if record.get("history"):
        raise UsageError(f"{where}: 'history' beside '{key}'", "write the earlier turns as messages")
    messages, tools = [_message(message, where) for message in raw], _tools(record, where)
    if system := system_of(record, where):
        if messages and messages[0]["role"] == "system":
            raise UsageError(f"{where}: 'system' beside a message of the role system", "keep one of the two")
        messages.insert(0, {"role": "system", "content": system})
    roles = [message["role"] for message in messages]
    asked = next((i for i, role in enumerate(roles) if role in ("user", "tool")), None)
    if not messages or roles[-1] != "assistant":
        raise UsageError(f"{where}: the response is empty", "end with an answer of the assistant")
    weights = [message.pop("learned") for message in messages if message["role"] == "assistant"]
    answers = [i for i, role in enumerate(roles) if role == "assistant"]
    learned = [i for i, weight in zip(answers, weights, strict=True) if weight and asked is not None and i > asked]
    if not learned:
        what = "no answer has a weight" if asked is not None else "the prompt is empty"
        raise UsageError(f"{where}: {what}", "nothing of the record would be learned")
    if any(not (messages[i]["content"].strip() or messages[i].get("tool_calls")) for i in learned):
        raise UsageError(f"{where}: the response is empty", "fill it in")
    messages, roles = messages[: learned[-1] + 1], roles[: learned[-1] + 1]
    if any(role == "user" and not m["content"].strip() for role, m in zip(roles, messages, strict=True)):
        raise UsageError(f"{where}: the prompt is empty", "fill it in")
    extra = next((key for message in messages for key in SAID if key in message), "tools" if tools else "")
    start = int(roles[0] == "system")
    if not extra and roles[start:] == ["user", "assistant"] * ((len(roles) - start) // 2):
        texts = [message["content"] for message in messages]
        turns = tuple(Turn(texts[i], "", texts[i + 1], i + 1 in learned) for i in range(start, len(texts), 2))
        return Record(where, turns, texts[0] if start else "")
    why = f"'{extra}'" if extra else f"messages of {', '.join(roles)}"
    return Record(where, (), chat=Chat(tuple(messages), tuple(learned), tools, why))


def with_context(record: dict[str, Any], found: Iterable[Record], where: str) -> list[Record]:
    """Give records of other forms the system text and the earlier turns that stand beside them.

    Raises:
        UsageError: these are not readable, or there are tools, which only messages can have.
    """
    if record.get("tools"):
        raise UsageError(f"{where}: 'tools' in a record without messages", _MESSAGES)
    system, history = system_of(record, where), record.get("history") or []
    pairs = history if isinstance(history, list) else [None]
    if not all(isinstance(p, list) and len(p) == 2 and all(isinstance(t, str) for t in p) for p in pairs):
        raise UsageError(f"{where}: 'history' is no list of pairs of texts", "write [[request, answer], ...]")
    earlier = tuple(Turn(asked, "", answer) for asked, answer in pairs)
    return [replace(r, system=system, turns=(*earlier, *r.turns)) for r in found]


def system_of(record: dict[str, Any], where: str) -> str:
    """Return the system text that stands beside a record's own keys."""
    return text_in(record, "system", where) or text_in(record, "system_prompt", where)


def text_in(record: dict[str, Any], key: str, where: str) -> str:
    """Return the text of a key, "" for null or none, a list of text parts joined.

    Raises:
        UsageError: it is something else.
    """
    value = record.get(key)
    if isinstance(value, list):
        return "".join(_part(part, key, where) for part in value)
    if value is not None and not isinstance(value, str):
        raise UsageError(f"{where}: '{key}' is {kind_of(value)}, not text", "write it as text in quotes")
    return value or ""


def _part(part: Any, key: str, where: str) -> str:
    part = {"text": part} if isinstance(part, str) else part
    if not isinstance(part, dict):
        raise UsageError(f"{where}: '{key}' is a list with {kind_of(part)}, not text", "write it as text in quotes")
    if part.get("type") not in (None, "text") or not isinstance(part.get("text"), str):
        raise UsageError(f"{where}: '{key}' has a part of type {part.get('type')!r}", "only parts of text are read")
    return part["text"]


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a message as a chat template takes it, that of an assistant with `learned`."""
    # a table has every key in every row
    message = {key: value for key, value in message.items() if value is not None}
    sender = "role" if "role" in message else "from"
    name = message.get(sender)
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        what = "without a role" if name is None else f"of the {sender} {name!r}"
        raise UsageError(f"{where}: a message {what}", f"roles that are read here: {', '.join(_ROLES)}")
    if unread := next((key for key in _UNREAD if message.get(key) not in (None, [])), None):
        raise UsageError(f"{where}: '{unread}' of a message is not read", "weight 0 marks a message as context")
    read = {"role": role, "content": text_in(message, "content" if "content" in message else "value", where)}
    if role == "tool":
        return read | {key: message[key] for key in ("name", "tool_call_id") if key in message}
    if role != "assistant":
        return read
    for key in _LEARNED:
        if message.get(key, 1) not in (0, 1):
            raise UsageError(f"{where}: '{key}' of a message is {message[key]!r}", "0 is context, 1 is learned")
    calls = message.get("tool_calls") or message.get("function_call")
    if name == "function_call":
        calls, read["content"] = read["content"], ""
    if calls:
        read["tool_calls"] = _calls(calls, where)
    read |= {key: message[key] for key in SAID[1:] if message.get(key)}
    return read | {"learned": all(message.get(key, 1) for key in _LEARNED)}


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Return calls of tools in the form of chat templates, whose arguments are an object."""
    calls = parse_json(calls, f"{where}: the call of a tool") if isinstance(calls, str) else calls
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function") or call if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UsageError(f"{where}: a call without the name of a tool", "write its name and arguments")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = parse_json(arguments, f"{where}: the arguments of {function['name']}")
        marks = {"id": call["id"]} if call.get("id") else {}
        found.append({"type": "function", **marks, "function": {"name": function["name"], "arguments": arguments}})
    return found


def _tools(record: dict[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    tools = record.get("tools") or []
    tools = parse_json(tools, f"{where}: 'tools'") if isinstance(tools, str) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UsageError(f"{where}: 'tools' is no list of objects", "write each tool as a JSON schema")
    if record.get("functions"):
        raise UsageError(f"{where}: 'functions' is not read", "write them as 'tools'")
    return tuple(tools)
