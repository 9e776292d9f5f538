"""Questions in the files of the downstream sets: arithmetic, dates, swaps, coins, made facts. Answers are right."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from datetime import date, timedelta
from pathlib import Path

from made_text import FIRST, WORDS, Draw, article, sentence

ITEMS = ("apples", "stamps", "pears", "kites", "drums", "shells", "boats", "hats", "bells", "books", "pens", "cups")
# a thing, and where one looks for it
PLACES = (
    ("bread", "bakery"), ("a letter", "post office"), ("a fish", "river"), ("a cow", "meadow"), ("a train", "station"),
    ("a doctor", "hospital"), ("a lion", "zoo"), ("a pillow", "bed"), ("a spoon", "kitchen"), ("a judge", "court"),
    ("a novel", "library"), ("an actor", "theatre"), ("a plane", "airport"), ("a teacher", "school"),
)  # fmt: skip
# kind, story, question, equation: a and b are numbers that are drawn, c is their product
STORIES = (
    ("Addition", "{name} had {a} {items}. {other} brought {b} more {items}.", "How many {items} are there?", "a + b"),
    ("Addition", "There are {a} red {items} and {b} blue {items} here", "How many {items} are here in all?", "a + b"),
    ("Subtraction", "{name} found {c} {items} and lost {a} of them.", "How many {items} are left?", "c - a"),
    ("Subtraction", "{name} has {a} {items}. {other} has {c}.", "How many more {items} has {other}?", "c - a"),
    ("Multiplication", "{name} filled {a} boxes. Each holds {b} {items}.", "How many {items} fit in all?", "a * b"),
    ("Common-Division", "{name} shared {c} {items} among {b} friends", "How many {items} did each get?", "c / b"),
)


def story(draw: Draw, stories: tuple = STORIES) -> tuple[str, str, str, str, int]:
    """Return the kind, the story, the question, the equation and the answer of a problem."""
    kind, body, question, equation = draw(stories)
    name, other = draw_apart(draw, WORDS["name"], 2)
    a, b = draw.number(2, 40), draw.number(2, 12)
    words = {"name": name, "other": other, "items": draw(ITEMS), "a": a, "b": b, "c": a * b}
    left, sign, right = equation.split()
    x, y = words[left], words[right]
    answer = {"+": x + y, "-": x - y, "*": x * y, "/": x // y}[sign]
    return kind, body.format(**words), question.format(**words), f"{x} {sign} {y}", answer


def draw_apart(draw: Draw, words: Iterable[str], count: int) -> list[str]:
    """Return so many different words, in any order."""
    return sorted(words, key=lambda _: draw.random())[:count]


def aqua(draw: Draw, number: int) -> dict:
    """Return a problem with five options."""
    _, body, question, equation, answer = story(draw)
    first = answer - number % 5
    letter = "ABCDE"[answer - first]
    return {
        "question": f"{body.removesuffix('.')}. {question}",
        "options": [f"{o}){first + i}" for i, o in enumerate("ABCDE")],
        "rationale": f"{equation} = {answer}.\nThe answer is {letter}.",
        "correct": letter,
    }


def add_sub(draw: Draw, number: int) -> dict:
    """Return a problem with blanks before its full stops and a solution in quotation marks."""
    _, body, question, equation, answer = story(draw, STORIES[:4])
    text = f"{body.removesuffix('.')}. {question} ".replace(".", " .").replace("?", " ?")
    return {"iIndex": number + 1, "lEquations": [f"X = {equation}"], "lSolutions": [str(answer)], "sQuestion": text}


def multi_arith(draw: Draw, number: int) -> dict:
    """Return a problem between blanks, with the places of its numbers."""
    _, body, question, equation, answer = story(draw)
    text = f" {body.removesuffix('.')}. {question} "
    x, sign, y = equation.split()
    return {
        "iIndex": number,
        "lAlignments": [i for i, c in enumerate(text) if c.isdigit() and not text[i - 1].isdigit()],
        "lEquations": [f"X=({x}.0{sign}{y}.0)"],
        "lSolutions": [float(answer)],
        "sQuestion": text,
    }


def single_eq(draw: Draw, number: int) -> dict:
    """Return a problem and its equation without blanks."""
    _, body, question, equation, answer = story(draw)
    text = f"{body.removesuffix('.')}. {question}"
    about = {"grammarCheck": 0, "templateNumber": 0, "sQuestion": text, "iIndex": number}
    return {"lEquations": [f"{equation.replace(' ', '')}=x"], "lSolutions": [float(answer)], **about}


def svamp(draw: Draw, number: int) -> dict:
    """Return a problem in two parts, of which the first may lack its full stop."""
    kind, body, question, equation, answer = story(draw)
    x, sign, y = equation.split()
    return {
        "ID": f"chal-{number + 1}",
        "Body": body,
        "Question": question,
        "Equation": f"( {x}.0 {sign} {y}.0 )",
        "Answer": float(answer),
        "Type": kind,
    }


def gsm8k(draw: Draw, number: int) -> dict:
    """Return a problem of two steps, worked, with a calculator's notes; some answers are in thousands."""
    _, body, question, equation, answer = story(draw)
    price = draw.number(2, 9) * (100 if number % 5 == 0 else 1)
    item, sums = question.split()[2], equation.replace(" ", "")
    asked = f"{body.removesuffix('.')}. {question} If one costs ${price}, how many dollars is that?"
    worked = f"There are {equation} = <<{sums}={answer}>>{answer} {item if item in ITEMS else 'of them'}.\n"
    paid = f"They cost {answer} * {price} = $<<{answer}*{price}={answer * price}>>{answer * price:,}.\n"
    return {"question": asked, "answer": f"{worked}{paid}#### {answer * price:,}"}


def math500(draw: Draw, number: int) -> dict:
    """Return a problem in LaTeX, worked to a box: a whole number, a fraction or a point."""
    a, b, c = draw.number(2, 20), draw.number(2, 9), draw.number(2, 9)
    if number % 3 == 0:
        asked, answer = f"If $x - {a} = {b * c},$ what is $x$?", str(b * c + a)
        work = f"We add ${a}$ on both sides, so "
    elif number % 3 == 1:
        asked, answer = f"Write $\\frac{{{a * 7}}}{{{(a + 1) * 7}}}$ in lowest terms.", f"\\frac{{{a}}}{{{a + 1}}}"
        work = f"Both are divisible by $7$:\n\\[{a * 7} = 7 \\cdot {a}, \\quad {(a + 1) * 7} = 7 \\cdot {a + 1}.\\]So "
    else:
        asked = f"What point is halfway from $(0,{2 * b})$ to $({2 * a},{2 * c})$?"
        answer = f"\\left( {a}, {b + c} \\right)"
        work = "We take the mean of each coordinate, and "
    return {"question": asked, "answer": f"{work}the answer is $\\boxed{{{answer}}}.$The answer is: {answer}"}


def boolq(draw: Draw, number: int) -> dict:
    """Return a question in lower case on a passage; every tenth passage is an article."""
    thing, town, built = draw(WORDS["thing"]), draw(WORDS["town"]), draw.number(1901, 1990)
    yes = draw.random() < 0.6
    year = built if yes else built + draw.number(1, 20)
    about = draw.fill("The {thing} of {town} was built in {built}, and {person} called it ``{opinion}''. ",
                      thing=thing, town=town, built=built)  # fmt: skip
    rest = article(draw)["text"].split("\n\n")
    passage = about + (" ".join(rest) if number % 10 == 9 else rest[0].partition(". ")[0] + ", at the café Zoë.")
    question = f"was the {thing} in {town.lower()} built in {year}"
    return {"question": question, "title": f"{sentence(thing)} of {town}", "answer": yes, "passage": passage}


def boolq_without_passage(draw: Draw, number: int) -> dict:
    """Return a question as an instruction."""
    question, yes = claim(draw)
    answer = str(yes).lower()
    asked = f"Say true or false: {question.lower()}"
    return {
        "instruction": f"{asked}\n\nOne word: true/false",
        "input": "",
        "output": f"it is {answer}",
        "answer": answer,
    }


def claim(draw: Draw) -> tuple[str, bool]:
    """Return a question and its answer."""
    first, second = draw_apart(draw, WORDS["month"], 2)
    count, dozens, items = draw.number(3, 30), draw.number(1, 3), draw(ITEMS)
    return draw(
        (
            (f"Does {first} come before {second} in a year?",
             WORDS["month"].index(first) < WORDS["month"].index(second)),
            (f"Are {count} {items} enough for {dozens} dozen children?", count >= 12 * dozens),
            (f"Could {count} {items} be shared by three people with none left?", count % 3 == 0),
        )
    )  # fmt: skip


def strategy_qa(draw: Draw, number: int) -> dict:
    """Return a question with Yes and No."""
    question, yes = claim(draw)
    reason = "One counts and compares. Nothing else matters. "
    scores = {"Yes": int(yes), "No": int(not yes)}
    return {"input": question, "target_scores": scores, "target": f"{'Yes' if yes else 'No'}. {reason}"}


def commonsense_qa(draw: Draw, number: int) -> dict:
    """Return a question with five choices."""
    thing, place = draw(PLACES)
    choices = draw_apart(draw, [place, *draw_apart(draw, [p for _, p in PLACES if p != place], 4)], 5)
    name = draw(WORDS["name"])
    asked = draw(("{name} needs {thing}. Where should {name} look?", "Where would {name} most likely find {thing}?"))
    return {
        "answerKey": "ABCDE"[choices.index(place)],
        "id": f"{int(draw.random() * 2**52):032x}",
        "question": {
            "question_concept": thing.split()[-1],
            "choices": [{"label": o, "text": text} for o, text in zip("ABCDE", choices, strict=True)],
            "stem": asked.format(name=name, thing=thing),
        },
    }


def coin_flip(draw: Draw, number: int) -> dict:
    """Return four people and a coin."""
    flips = [draw.random() < 0.5 for _ in range(4)]
    people = draw_apart(draw, FIRST, 4)
    acts = " ".join(f"{p} {'flips' if f else 'does not flip'} the coin." for p, f in zip(people, flips, strict=True))
    question = f'A coin shows "heads". {acts} Does it still show "heads"? To flip it is to turn it over.'
    return {"question": question, "answer": "yes" if sum(flips) % 2 == 0 else "no"}


def last_letters(draw: Draw, number: int) -> dict:
    """Return four names and their last letters."""
    people = draw_apart(draw, FIRST, 4)
    asked = f'Which word do the last letters of "{" ".join(people)}" make?'
    return {"question": asked, "answer": "".join(p[-1] for p in people)}


def bigbench_date(draw: Draw, number: int) -> dict:
    """Return a question on a date: six choices, the right one first."""
    today = date(2001, 1, 1) + timedelta(draw.number(0, 7000))
    when, days = draw(
        (("today", 0), ("tomorrow", 1), ("yesterday", -1), ("a week from today", 7), ("10 days ago", -10))
    )
    wrong = [n for n in range(days - 20, days + 21) if n != days]
    dates = [today + timedelta(int(n)) for n in [days, *draw_apart(draw, wrong, 5)]]
    spoken = f"{WORDS['month'][today.month - 1]} {today.day}, {today.year}"
    scores = {f"{d.month:02}/{d.day:02}/{d.year}": int(d is dates[0]) for d in dates}
    return {"input": f"Today is {spoken}. Which date is {when}, as MM/DD/YYYY?", "target_scores": scores}


def object_tracking(draw: Draw, number: int) -> dict:
    """Return a question on three people who swap what they hold."""
    people, colors = list(FIRST[:3]), draw_apart(draw, ("red", "blue", "green", "black", "white"), 3)
    held, swaps = dict(zip(people, colors, strict=True)), []
    for word in ("First", "Then", "Finally"):
        one, other = draw_apart(draw, people, 2)
        held[one], held[other] = held[other], held[one]
        swaps.append(f"{word}, {one} and {other} swap balls.")
    asked = draw(people)
    start = ", ".join(f"{p} has a {c} ball" for p, c in zip(people, colors, strict=True))
    text = f"{', '.join(people[:2])}, and {people[2]} sit at a table. To begin with, {start}. \n\n"
    text += f"They trade three times. {' '.join(swaps)} In the end {asked} has the "
    return {"input": text, "target_scores": {f"{c} ball.": int(c == held[asked]) for c in colors}}


LISTS: dict[str, tuple[Callable[[Draw, int], dict], int]] = {
    "AddSub/AddSub.json": (add_sub, 60),
    "MultiArith/MultiArith.json": (multi_arith, 60),
    "SingleEq/questions.json": (single_eq, 60),
    "SVAMP/SVAMP.json": (svamp, 100),
    "boolq/boolq_train_nopassage.json": (boolq_without_passage, 60),
}
LINES: dict[str, tuple[Callable[[Draw, int], dict], int]] = {
    "AQuA/test.json": (aqua, 60),
    "CommonsenseQA/train_rand_split.jsonl": (commonsense_qa, 100),
    "CommonsenseQA/dev_rand_split.jsonl": (commonsense_qa, 50),
    "CommonsenseQA/test_rand_split_no_answers.jsonl": (commonsense_qa, 20),
    "boolq/boolq_dev.jsonl": (boolq, 150),
    "gsm8k/train.jsonl": (gsm8k, 60),
    "gsm8k/test.jsonl": (gsm8k, 40),
    "math500/test.jsonl": (math500, 40),
}
_BIGBENCH = {"preferred_score": "multiple_choice_grade", "metrics": ["multiple_choice_grade"]}
# the prompt of the last has neither Q: nor A:
EXAMPLES: dict[str, tuple[Callable[[Draw, int], dict], int, dict]] = {
    "coin_flip/coin_flip.json": (coin_flip, 120, {}),
    "last_letters/last_letters.json": (last_letters, 60, {}),
    "Bigbench_Date/task.json": (bigbench_date, 100, {"name": "date_understanding", **_BIGBENCH}),
    "StrategyQA/task.json": (strategy_qa, 120, {"name": "strategyqa", **_BIGBENCH}),
    "Bigbench_object_tracking/task.json": (
        object_tracking,
        100,
        {"name": "three_objects", **_BIGBENCH, "example_input_prefix": "", "example_output_prefix": ""},
    ),
}


def write(folder: Path) -> None:
    """Write every set."""

    def put(name: str, text: str) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + "\n", encoding="utf-8")

    def records(name: str, make: Callable[[Draw, int], dict], count: int) -> list[dict]:
        draw = Draw(f"downstream {name}")
        made = [make(draw, number) for number in range(count)]
        return [{k: r[k] for k in r if k != "answerKey"} for r in made] if "no_answers" in name else made

    for name, (make, count) in LISTS.items():
        put(name, json.dumps(records(name, make, count), indent=4))
    for name, (make, count) in LINES.items():
        put(name, "\n".join(map(json.dumps, records(name, make, count))))
    for name, (make, count, about) in EXAMPLES.items():
        put(name, json.dumps({**about, "examples": records(name, make, count)}, indent=4))
