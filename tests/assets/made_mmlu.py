"""Multiple-choice questions in the files of MMLU: 57 subjects, CSV without header."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from made_text import FIRST, WORDS, Draw, sentence

SUBJECTS = (
    "abstract_algebra", "anatomy", "astronomy", "business_ethics", "clinical_knowledge", "college_biology",
    "college_chemistry", "college_computer_science", "college_mathematics", "college_medicine", "college_physics",
    "computer_security", "conceptual_physics", "econometrics", "electrical_engineering", "elementary_mathematics",
    "formal_logic", "global_facts", "high_school_biology", "high_school_chemistry", "high_school_computer_science",
    "high_school_european_history", "high_school_geography", "high_school_government_and_politics",
    "high_school_macroeconomics", "high_school_mathematics", "high_school_microeconomics", "high_school_physics",
    "high_school_psychology", "high_school_statistics", "high_school_us_history", "high_school_world_history",
    "human_aging", "human_sexuality", "international_law", "jurisprudence", "logical_fallacies", "machine_learning",
    "management", "marketing", "medical_genetics", "miscellaneous", "moral_disputes", "moral_scenarios", "nutrition",
    "philosophy", "prehistory", "professional_accounting", "professional_law", "professional_medicine",
    "professional_psychology", "public_relations", "security_studies", "sociology", "us_foreign_policy", "virology",
    "world_religions",
)  # fmt: skip
AUXILIARY = ("arc_easy", "arc_hard", "aux_law_90s", "mc_test", "obqa", "science_elementary", "science_middle")
# questions of each subject in each part; the published ones have 5 in dev too
ROWS = {"dev": 5, "val": 3, "test": 8}
ACCENTED = ("Zoë Übel", "René Café", "José Núñez", "Łukasz Wójcik", "Søren Ågård")


def product(draw: Draw) -> tuple[str, str, Iterable[object]]:
    """Return a question, its answer, and other choices."""
    a, b = draw.number(3, 19), draw.number(3, 19)
    question = draw.fill(
        "A barn has {a} rooms, and {b} animals, such as a {animal}, live in each. How many?", a=a, b=b
    )
    return question, str(a * b), (a * b + 1, a * b + a, a + b)


def year(draw: Draw) -> tuple[str, str, Iterable[object]]:
    """Return a question about a made event: cells with commas."""
    start, wait = draw.number(1901, 1960), draw.number(3, 50)
    event = draw.fill(
        "{office} of {town} chose a {thing} of {material}, which was built {wait} years later", wait=wait
    )
    right = start + wait
    return f"In {start}, {event}. In which year was it built?", str(right), (right + 10, right - 1, "Never, in fact")


def after(draw: Draw) -> tuple[str, str, Iterable[object]]:
    """Return a question about days: choices with commas."""
    days, day = WORDS["day"], draw.number(0, 6)
    others = (f"{days[(day + i) % 7]}, {days[(day + j) % 7]}" for i, j in ((2, 1), (6, 5), (3, 4)))
    return f"Which two days follow {days[day]}, in order?", f"{days[(day + 1) % 7]}, {days[(day + 2) % 7]}", others


def speaker(draw: Draw) -> tuple[str, str, Iterable[object]]:
    """Return a question about a note: cells with line ends, quotation marks and accents."""
    right, *others = draw_apart(draw, [*ACCENTED, *FIRST], 4)
    note = draw.fill('The {thing} of {town} is "{opinion}", said {who},\nand all {people} agreed.', who=right)
    return f"Read the note.\n\n{note}\n\nWho spoke of the work?", right, others


def both(draw: Draw) -> tuple[str, str, Iterable[object]]:
    """Return a question about two claims, with an answer of two lines."""
    a, b, c = (draw.number(2, 99) for _ in range(3))
    right = ("true" if a % 2 == 0 else "false", "true" if b > c else "false")
    pairs = [(one, two) for one in ("true", "false") for two in ("true", "false")]
    question = f"The first claim is that {a} is even. The second claim is that {b} is greater than {c}. What holds?"
    return question, " and\n".join(right), (" and\n".join(pair) for pair in pairs if pair != right)


KINDS = (product, year, after, speaker, both)


def draw_apart(draw: Draw, words: Iterable[str], count: int) -> list[str]:
    """Return so many different words, in any order."""
    return sorted(words, key=lambda _: draw.random())[:count]


def row(draw: Draw, subject: str) -> list[str]:
    """Return the six cells of a question: text, four choices, the letter of the right one."""
    question, right, others = draw(KINDS)(draw)
    if subject.endswith("history"):
        question = f"{sentence(draw.fill('{office} {verb} the {thing} {reason}, which was {opinion}.'))}\n{question}"
    choices = draw_apart(draw, [right, *map(str, others)], 4)
    return [question, *choices, "ABCD"[choices.index(right)]]


def write_csv(path: Path, subject: str, count: int) -> None:
    """Write so many questions of a subject; the name of the file decides which."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = Draw(f"mmlu {path.parent.name} {path.name}")
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(row(draw, subject) for _ in range(count))


def write(folder: Path) -> None:
    """Write all parts of all subjects, and the files that are for training."""
    for part, count in ROWS.items():
        for subject in SUBJECTS:
            write_csv(folder / part / f"{subject}_{part}.csv", subject, count)
    for name in AUXILIARY:
        write_csv(folder / "auxiliary_train" / f"{name}.csv", name, 20)
