"""Prompt templates: records as text in which every character is either given or to be learned.

A template is a YAML file with `prompt`, and if wanted `prompt_with_input` and `response`, in which {instruction},
{input} and {response} stand for the record's texts. ``chat`` is the chat template of the tokenizer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from lowrank_cli.config import read_yaml
from lowrank_cli.data.instructions import Record
from lowrank_cli.errors import MissingError, UsageError, unknown

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
        eos: whether end-of-text still has to be put after every part, to be learned.
    """

    where: str
    parts: tuple[tuple[Segment, ...], ...]
    bos: bool = True
    eos: bool = True


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


def turns_of(record: Record) -> list[tuple[str, str]]:
    """The requests, each with its input under it, and the responses."""
    return [("\n\n".join(t for t in (turn.instruction, turn.input) if t), turn.response) for turn in record.turns]


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
    filled = []
    for turn, (request, _) in zip(record.turns, turns_of(record), strict=True):
        own = bool(turn.input) and "prompt_with_input" in parts
        # without a prompt for it the input stands under the instruction
        instruction = turn.instruction if own else request
        if record.system and not filled:
            instruction = f"{record.system}\n\n{instruction}"
        prompt = _fill(
            parts["prompt_with_input" if own else "prompt"], {"instruction": instruction, "input": turn.input}
        )
        response = _fill(parts["response"], {"response": turn.response})
        filled.append((Segment(prompt, False), Segment(response, True)))
    return Text(record.where, tuple(filled))


def _chat(tokenizer: PreTrainedTokenizerFast, record: Record) -> Text:
    messages = [{"role": "system", "content": record.system}] if record.system else []
    segments, done = [], ""
    for request, response in turns_of(record):
        messages.append({"role": "user", "content": request})
        prompt = _render(tokenizer, messages, record.where, add_generation_prompt=True)
        messages.append({"role": "assistant", "content": response})
        whole = _render(tokenizer, messages, record.where)
        # what the model sees before it answers has to be what it sees in training
        if not (prompt.startswith(done) and whole.startswith(prompt)):
            raise UsageError(
                f"{record.where}: the tokenizer's chat template writes the beginning of a conversation in another "
                "way once it goes on, so that the responses cannot be told from the rest",
                "take --template alpaca, plain or qa",
            )
        said, eos, rest = whole[len(prompt) :].rpartition(tokenizer.eos_token)
        # what a template writes after the end of text is never generated; without such an end it is all the response
        segments += [Segment(prompt[len(done) :], False), Segment(said + eos or rest, True)]
        segments += [Segment(rest, False)] if eos and rest else []
        done = whole
    ends = segments[-1].target is False or segments[-1].text.endswith(tokenizer.eos_token)
    # nothing follows what stands after the last end of text
    segments = segments if segments[-1].target else segments[:-1]
    # a chat template writes the beginning of text itself where the model was trained with one
    return Text(record.where, (tuple(segments),), bos=False, eos=not ends)


def _render(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], where: str, **options: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except (TemplateError, ValueError, TypeError) as error:
        raise UsageError(
            f"{where}: the tokenizer's chat template refuses the conversation: {' '.join(str(error).split())}",
            "take --template alpaca, plain or qa, or mend the record",
        ) from error
