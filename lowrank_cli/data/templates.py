"""Prompt templates: records as text in which every character is either given or to be learned.

A template is a YAML file with `prompt`, and if wanted `prompt_with_input` and `response`, in which {instruction},
{input} and {response} stand for the record's texts. ``chat`` is the chat template of the tokenizer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from lowrank_cli.data.conversations import SAID, Chat, Record
from lowrank_cli.errors import MissingError, UsageError, unknown
from lowrank_cli.foreign import read_yaml

FOLDER = Path(__file__).parent / "templates"
CHAT = "chat"
_FIELDS = {
    "prompt": ({"instruction"}, {"instruction"}),
    "prompt_with_input": ({"instruction", "input"}, {"instruction", "input"}),
    "response": ({"response"}, {"response"}),
}


@dataclass(frozen=True)
class Segment:
    """A stretch of text, and whether it is what the assistant says."""

    text: str
    target: bool


@dataclass(frozen=True)
class Text:
    """A record as text.

    Attributes:
        where: the record's place for messages.
        parts: each a text of its own for the tokenizer, in segments; the row is the parts joined.
        bos: whether the tokenizer's own beginning-of-text token still has to be put in front.
        eos: whether end-of-text still has to be put after every part, to be learned if the part's end is.
        unlearned: answers that are context because the template writes them in another way once others follow.
    """

    where: str
    parts: tuple[tuple[Segment, ...], ...]
    bos: bool = True
    eos: bool = True
    unlearned: int = 0


@dataclass(frozen=True)
class Template:
    """Records as text; its name goes into run.json."""

    name: str
    render: Callable[[Record], Text]


def names() -> list[str]:
    """The templates that need no file."""
    return sorted([CHAT, *(path.stem for path in FOLDER.glob("*.yaml"))])


def load(name: str, tokenizer: PreTrainedTokenizerFast, *, task: bool = False) -> Template:
    """A template by name or file.

    Args:
        name: one of `names()`, a path that ends in .yaml or .yml, or "auto".
        tokenizer: whose chat template is meant by chat.
        task: whether the records are those of a task, for which auto is qa.
    Raises:
        UsageError: no such template, a file that is none, or a tokenizer without a chat template.
        MissingError: no such file.
    """
    if name == "auto":
        name = "qa" if task else CHAT if tokenizer.chat_template else "alpaca"
    if name == CHAT:
        if not tokenizer.chat_template:
            raise UsageError(
                "the tokenizer has no chat template",
                "take --template alpaca, plain or qa, or a model that was made for chat",
            )
        return Template(CHAT, lambda record: _chat(tokenizer, record))
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        if name not in names():
            raise unknown("template", name, names(), "--template")
        path = FOLDER / f"{name}.yaml"
    elif not path.is_file():
        raise MissingError(f"there is no template file {path}", f"templates without a file: {', '.join(names())}")
    parts = _parse(read_yaml(path), path)
    return Template(name, lambda record: _filled(parts, record))


def _parse(content: dict[str, Any], path: Path) -> dict[str, list[tuple[str, str | None]]]:
    """Each text of a template as (literal, name of the field after it) pairs."""
    for key in content:
        if key not in _FIELDS:
            raise unknown("key", key, _FIELDS, str(path))
    if "prompt" not in content:
        raise UsageError(f"{path} has no prompt", 'write one, such as prompt: "{instruction}\\n"')
    parsed = {}
    for key, text in {"response": "{response}", **content}.items():
        allowed, needed = _FIELDS[key]
        if not isinstance(text, str):
            raise UsageError(f"{key} in {path} is {text!r}, not text", "put it in quotes")
        try:
            pieces = [(literal, name) for literal, name, _, _ in Formatter().parse(text)]
        except ValueError as error:
            raise UsageError(f"{key} in {path}: {error}", "write a brace that is meant as one twice: {{ }}") from None
        used = {name for _, name in pieces if name is not None}
        if wrong := used - allowed:
            raise unknown("field", sorted(wrong)[0], allowed, f"{key} of {path}")
        if missing := needed - used:
            raise UsageError(f"{key} in {path} lacks {{{sorted(missing)[0]}}}", "put it where the text belongs")
        parsed[key] = pieces
    return parsed


def _fill(pieces: list[tuple[str, str | None]], texts: dict[str, str]) -> str:
    # not str.format: braces in a record are text
    return "".join(literal + ("" if name is None else texts[name]) for literal, name in pieces)


def _filled(parts: dict[str, list[tuple[str, str | None]]], record: Record) -> Text:
    if record.chat is not None:
        raise UsageError(
            f"{record.where}: {record.chat.why}, which only a chat template can write",
            "take --template chat with a tokenizer that has one",
        )
    filled = []
    for turn in record.turns:
        own = bool(turn.input) and "prompt_with_input" in parts
        # without a prompt for it the input stands under the instruction
        instruction = turn.instruction if own else "\n\n".join(t for t in (turn.instruction, turn.input) if t)
        if record.system and not filled:
            instruction = f"{record.system}\n\n{instruction}"
        prompt = _fill(
            parts["prompt_with_input" if own else "prompt"], {"instruction": instruction, "input": turn.input}
        )
        response = _fill(parts["response"], {"response": turn.response})
        filled.append((Segment(prompt, False), Segment(response, turn.learned)))
    return Text(record.where, tuple(filled))


def _chat(tokenizer: PreTrainedTokenizerFast, record: Record) -> Text:
    chat, where = record.as_chat(), record.where
    final = _render(tokenizer, chat.messages, chat.tools, where)
    if record.chat is not None:
        _check_written(tokenizer, chat, final, where)
    segments: list[Segment] = []
    done = unlearned = 0
    for number in chat.learned:
        prompt = _render(tokenizer, chat.messages[:number], chat.tools, where, add_generation_prompt=True)
        last = number == len(chat.messages) - 1
        whole = final if last else _render(tokenizer, chat.messages[: number + 1], chat.tools, where)
        # what the model sees before it answers has to be what it sees in training
        if not (len(prompt) >= done and whole.startswith(prompt) and final.startswith(whole)):
            if not last:
                # such as a template that drops the thoughts of earlier answers
                unlearned += 1
                continue
            raise UsageError(
                f"{where}: the tokenizer's chat template writes an answer in another way than the beginning of one, "
                "so that it cannot be told from the rest",
                "take --template alpaca, plain or qa",
            )
        if _letters(chat.messages[number]["content"]) not in _letters(whole[len(prompt) :]):
            # such as a template that drops the thoughts of every answer, the last one's too
            raise UsageError(
                f"{where}: the tokenizer's chat template leaves out a part of an answer",
                "take --template alpaca, plain or qa, or drop what the template does not write from the answers",
            )
        said, eos, rest = whole[len(prompt) :].rpartition(tokenizer.eos_token)
        # what a template writes after the end of text is never generated; without such an end it is all the response
        segments += [Segment(final[done : len(prompt)], False), Segment(said + eos or rest, True)]
        segments += [Segment(rest, False)] if eos and rest else []
        done = len(whole)
    ends = segments[-1].target is False or segments[-1].text.endswith(tokenizer.eos_token)
    # nothing follows what stands after the last end of text
    segments = segments if segments[-1].target else segments[:-1]
    # a chat template writes the beginning of text itself where the model was trained with one
    return Text(where, (tuple(segments),), bos=False, eos=not ends, unlearned=unlearned)


def _letters(text: str) -> str:
    """Return a text without its white space, which templates trim."""
    return "".join(text.split())


def _check_written(tokenizer: PreTrainedTokenizerFast, chat: Chat, final: str, where: str) -> None:
    """Raise UsageError if the chat template leaves out the tools, their results or what an answer has beside text."""
    plain = [{key: value for key, value in message.items() if key not in SAID} for message in chat.messages]
    without = {
        "the tools": (chat.messages, ()),
        "the tools' results": ([message for message in chat.messages if message["role"] != "tool"], chat.tools),
        "what an answer has beside its content": (plain, chat.tools),
    }
    for what, (messages, tools) in without.items():
        if (list(messages), tools) == (list(chat.messages), chat.tools):
            continue
        try:
            same = _render(tokenizer, messages, tools, where) == final
        except UsageError:
            same = False
        if same:
            raise UsageError(
                f"{where}: the tokenizer's chat template leaves out {what}",
                "take a model whose template writes them, or drop them from the record",
            )


def _render(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]],
    where: str,
    **options: bool,
) -> str:
    try:
        return tokenizer.apply_chat_template(list(messages), tools=list(tools) or None, tokenize=False, **options)
    except (TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise UsageError(
            f"{where}: the tokenizer's chat template refuses the conversation: {' '.join(str(error).split())}",
            "take --template alpaca, plain or qa, or mend the record",
        ) from error
