"""Instruction records whose answers can be learned, in the files and forms of the published sets."""

from __future__ import annotations

import json
from pathlib import Path

from made_text import FIRST, NEWS, WORDS, Draw, article, sentence

Asked = tuple[str, str, str]
TOWNS, THINGS, MATERIALS = WORDS["town"], WORDS["thing"], WORDS["material"]


def arithmetic(draw: Draw) -> Asked:
    """Return a sum or a product."""
    a, b = draw.number(2, 60), draw.number(2, 12)
    if draw.random() < 0.5:
        return f"What is {a} plus {b}?", "", f"{a} plus {b} is {a + b}."
    return "Multiply the two numbers.", f"{a}, {b}", f"The product is {a * b}."


def spelling(draw: Draw) -> Asked:
    """Return a task on the letters of a word."""
    word = draw((*WORDS["animal"], *WORDS["toy"], *WORDS["food"], *WORDS["people"])).split()[-1]
    return draw((
        ("Write the word in capitals.", word, word.upper()),
        ("Spell the word letter by letter.", word, "-".join(word)),
        (f"How many letters has the word '{word}'?", "", f"It has {len(word)} letters."),
    ))  # fmt: skip


def fact(draw: Draw) -> Asked:
    """Return a fact of a made world: each town is known for one thing, built of one material by one person."""
    i = draw.number(0, len(TOWNS) - 1)
    town, thing, material = TOWNS[i], THINGS[i % len(THINGS)], MATERIALS[i % len(MATERIALS)]
    return draw((
        (f"What is {town} known for?", "", f"{town} is known for its {thing}."),
        ("Say what it is made of.", f"the {thing} of {town}", sentence(material) + "."),
        (f"Who built the {thing} of {town}?", "", f"{FIRST[i]} did."),
    ))  # fmt: skip


def after(draw: Draw) -> Asked:
    """Return what follows a day or a month."""
    kind = draw(("day", "month"))
    names, i = WORDS[kind], draw.number(0, 99)
    return f"Which {kind} comes after the given one?", names[i % len(names)], names[(i + 1) % len(names)]


def report(draw: Draw) -> Asked:
    """Return a news article to be written: the length differs much."""
    made = article(draw)
    if draw.random() < 0.4:
        return "Give the text a title.", made["text"], made["title"]
    return f"Write an article: {made['title']}.", "", made["text"]


def notice(draw: Draw) -> Asked:
    """Return a sentence or two of the news, to be written."""
    town = draw(TOWNS)
    said = [sentence(draw.fill(draw(NEWS), town=town)) for _ in range(draw.number(1, 2))]
    return f"Report something from {town}.", "", " ".join(said)


SHORT = (arithmetic, spelling, fact, after)
# kinds of each file, and how many records it has
LISTS = {
    "instruction_1100.json": (SHORT, 400),
    "alpaca_random_9k.json": ((*SHORT, notice), 400),
    "alpaca_filtered_claude_t45.json": ((*SHORT, notice), 300),
    "alpaca_en_demo.json": ((notice, report), 150),
    "dolly_3k.json": ((*SHORT, *SHORT, notice, report), 400),
}
CATEGORIES = {arithmetic: "closed_qa", spelling: "brainstorming", fact: "open_qa", after: "general_qa",
              notice: "creative_writing", report: "summarization"}  # fmt: skip


def record(draw: Draw, kinds: tuple, category: bool = False) -> dict[str, str]:
    """Return a record of Alpaca's keys, or of Dolly's."""
    kind = draw(kinds)
    instruction, given, output = kind(draw)
    more = {"category": CATEGORIES[kind]} if category else {}
    return {"instruction": instruction, **more, "input": given, "output": output}


def seed_task(draw: Draw, number: int) -> dict[str, object]:
    """Return a record of Self-Instruct."""
    kind = draw(SHORT)
    instruction, given, output = kind(draw)
    instances = [{"input": given, "output": output}]
    return {"id": f"seed_task_{number}", "name": kind.__name__, "instruction": instruction, "instances": instances,
            "is_classification": False}  # fmt: skip


def talk(draw: Draw) -> list[tuple[str, str]]:
    """Return who says what in a conversation of one to three turns, half of them with a system message."""
    said = [("system", draw(("Be short.", "You are the guide of a made world.")))] if draw.random() < 0.5 else []
    for _ in range(draw.number(1, 3)):
        instruction, given, output = draw(SHORT)(draw)
        said += [("user", f"{instruction}\n{given}" if given else instruction), ("assistant", output)]
    return said


def write(folder: Path) -> None:
    """Write the lists of records, the seed tasks, and conversations in the two usual forms."""
    folder.mkdir(parents=True)
    for name, (kinds, count) in LISTS.items():
        draw = Draw(name)
        records = [record(draw, kinds, category=name.startswith("dolly")) for _ in range(count)]
        (folder / name).write_text(json.dumps(records, indent=4), encoding="utf-8")
    draw = Draw("seeds")
    seeds = [json.dumps(seed_task(draw, number)) + "\n" for number in range(175)]
    (folder / "self_instruct_seed_tasks.jsonl").write_text("".join(seeds), encoding="utf-8")
    talks = [talk(draw) for _ in range(200)]
    chats = [{"messages": [{"role": role, "content": text} for role, text in said]} for said in talks]
    (folder / "chat.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    shared = [{"id": str(i), "conversations": [{"from": names[role], "value": text} for role, text in said]}
              for i, said in enumerate(talks)]  # fmt: skip
    (folder / "sharegpt.json").write_text(json.dumps(shared, indent=2), encoding="utf-8")
