"""Made sentences in the files of GLUE, as download_glue_data lays them out; a few words tell the label."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from made_text import WORDS, Draw, article

TRAIN, DEV = 300, 80
GOOD = ("charming", "funny", "warm", "clever", "moving", "splendid", "fresh", "touching")
BAD = ("dull", "bleak", "clumsy", "tedious", "noisy", "hollow", "stale", "tiresome")
FILMS = (
    "a {word} story of a {animal} and a {toy} .",
    "it 's a {word} and often {word2} journey to the {place}",
    '" the {place} " is {word} from start to end .',
    "never less than {word}",
    "{word} , {word2} -- and {feeling} at last",
)
# an acceptable sentence and what makes it unacceptable
CLAUSES = (
    ("{name} {act} in the {place}.", "{name} are {act} in the {place}."),
    ("The {animal} saw the {color} {toy}.", "The {animal} seed the {color} {toy}."),
    ("{name} ate {food} with the {animal}.", "{name} eated {food} with the {animal}."),
    ("Who {act} near the {place}?", "Who did {act} near of the {place}?"),
    ("{name} says that the {animal} is {feeling}.", "{name} says what that the {animal} is {feeling}."),
)
# a statement and the same in other words
FACTS = (
    (
        "{office} of {town} closed the {thing} in {year} .",
        "In {year} , the {thing} of {town} was closed by {office} .",
    ),
    ('" The {thing} is {opinion} , " said {person} .', "{person} called the {thing} {opinion} ."),
    ("{number} {people} of {town} asked for a {thing} .", "A {thing} was asked for by {number} {people} in {town} ."),
)


def sst2(draw: Draw) -> tuple[list[str], str]:
    """Return a remark on a film and its sentiment."""
    label = draw("01")
    words = GOOD if label == "1" else BAD
    return [draw.fill(draw(FILMS), word=draw(words), word2=draw(words))], label


def cola(draw: Draw) -> tuple[list[str], str]:
    """Return a sentence; 7 of 10 are acceptable."""
    good, bad = draw(CLAUSES)
    label = "1" if draw.random() < 0.7 else "0"
    return [draw.fill(good if label == "1" else bad)], label


def mrpc(draw: Draw) -> tuple[list[str], str]:
    """Return two sentences of the news; two thirds say the same."""
    given = {key: draw.fill(f"{{{key}}}") for key in ("office", "town", "thing", "year", "person", "number", "people")}
    first, second = draw(FACTS)
    label = "1" if draw.random() < 0.67 else "0"
    given["opinion"] = draw(WORDS["opinion"])
    if label == "0":
        second = draw(("{person} denied it .", "No {thing} was ever seen in {town} , said {person} ."))
    pair = [draw.fill(first, **given), draw.fill(second, **given)]
    return pair if draw.random() < 0.5 else pair[::-1], label


def rte(draw: Draw) -> tuple[list[str], str]:
    """Return a paragraph of the news and a claim; half follow from it."""
    text = article(draw)["text"].split("\n")[0]
    town, person = draw(WORDS["town"]), draw.fill("{person}")
    premise = f"{text} {person} lives in {town}."
    label = draw(("entailment", "not_entailment"))
    return [premise, f"{person} lives in {town}." if label == "entailment" else f"{person} never saw {town}."], label


def wnli(draw: Draw) -> tuple[list[str], str]:
    """Return a sentence with a pronoun and one with a name in its place."""
    toy, place, size, label = draw(WORDS["toy"]), draw(WORDS["place"]), draw(("big", "small")), draw("01")
    right, wrong = (toy, place) if size == "big" else (place, toy)
    said = f"The {toy} did not fit into the {place} because it was too {size}."
    return [said, f"The {right if label == '1' else wrong} was too {size}."], label


def qnli(draw: Draw) -> tuple[list[str], str]:
    """Return a question and a sentence, which answers half of them."""
    town, year = draw(WORDS["town"]), draw.number(1901, 2019)
    label = draw(("entailment", "not_entailment"))
    other = draw.fill("The {thing} of {town} is {opinion}.", town=town)
    return [f"When was {town} founded?", f"{town} was founded in {year}." if label == "entailment" else other], label


def stsb(draw: Draw) -> tuple[list[str], str]:
    """Return two sentences and how many of five words they share."""
    sentence = "{name} and the {animal} play with the {color} {toy} in the {place}."
    words = {key: draw(WORDS[key]) for key in ("name", "animal", "color", "toy", "place")}
    other = {key: word if draw.random() < 0.7 else draw(WORDS[key]) for key, word in words.items()}
    shared = sum(words[key] == other[key] for key in words)
    return [sentence.format(**words), sentence.format(**other)], f"{shared:.3f}"


def numbered(draw: Draw, example: Callable, number: int, label: bool) -> list[str]:
    """Return a row of the usual form: index, sentences, label."""
    texts, right = example(draw)
    return [str(number), *texts, *([right] if label else [])]


def table(path: Path, header: list[str] | None, rows: list[list[str]], start: str = "") -> None:
    """Write rows between tabs, nothing quoted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(row) + "\n" for row in ([header] if header else []) + rows]
    path.write_bytes((start + "".join(lines)).encode())


def write(folder: Path) -> None:
    """Write seven of the nine tasks; QNLI has a development part only, and test parts have no labels but MRPC's."""
    pair = ["index", "sentence1", "sentence2"]
    for part, count in (("train", TRAIN), ("dev", DEV), ("test", DEV)):
        draw, label = Draw(f"glue {part}"), part != "test"
        end = ["label"] if label else []
        rows = [cola(draw) for _ in range(count)]
        if label:
            sources = [[draw(("mm01", "md02")), right, "" if right == "1" else "*", *texts] for texts, right in rows]
            table(folder / "CoLA" / f"{part}.tsv", None, sources)
        else:
            table(folder / "CoLA/test.tsv", ["index", "sentence"], [[str(i), *t] for i, (t, _) in enumerate(rows)])
        rows = [numbered(draw, sst2, i, label) for i in range(count)]
        header, rows = (["sentence", "label"], [row[1:] for row in rows]) if label else (["index", "sentence"], rows)
        table(folder / "SST-2" / f"{part}.tsv", header, rows)
        for name, example in (("RTE", rte), ("WNLI", wnli), ("QNLI", qnli)):
            if (name, part) not in {("QNLI", "train"), ("QNLI", "test"), ("WNLI", "test")}:
                header = ["index", "question", "sentence"] if name == "QNLI" else pair
                rows = [numbered(draw, example, i, label) for i in range(count)]
                table(folder / name / f"{part}.tsv", header + end, rows)
        columns = ["genre", "filename", "year", "old_index", "source1", "source2"]
        rows = [numbered(draw, stsb, i, label) for i in range(count)]
        rows = [[row[0], "made", "stories", "2024", row[0], "none", "none", *row[1:]] for row in rows]
        header = [pair[0], *columns, *pair[1:], *(["score"] if label else [])]
        table(folder / "STS-B" / f"{part}.tsv", header, rows)
        rows = [[right, str(draw.number(1000, 9999)), str(i), *texts]
                for i, (texts, right) in enumerate(mrpc(draw) for _ in range(count))]  # fmt: skip
        name, start = ("msr_paraphrase_test.txt", "\ufeff") if part == "test" else (f"{part}.tsv", "")
        table(folder / "MRPC" / name, ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"], rows, start)
