"""Text for tests, written by a small grammar: news articles, stories for children, a play.

It is the same on every machine: of `random` only `Random.random` is used, whose stream Python promises to keep.
"""

from __future__ import annotations

import random
from collections.abc import Sequence


class Draw:
    """Draw from lists and ranges; the same seed gives the same draws on every version of Python."""

    def __init__(self, seed: int | str):
        self.random = random.Random(seed).random

    def __call__(self, choices: Sequence):
        """Return one of the choices."""
        return choices[int(self.random() * len(choices))]

    def number(self, low: int, high: int) -> int:
        """Return a whole number from low to high, both included."""
        return low + int(self.random() * (high - low + 1))

    def fill(self, template: str, **given: object) -> str:
        """Return a sentence of the template, whose {words} are drawn from the lists of this module."""
        return template.format_map(_Slots(self, given))


class _Slots(dict):
    def __init__(self, draw: Draw, given: dict):
        super().__init__(given)
        self.draw = draw

    def __missing__(self, key: str) -> str:
        word = key.rstrip("0123456789")
        if word == "number":
            value = str(self.draw.number(2, 98))
        elif word == "year":
            value = str(self.draw.number(1901, 2019))
        elif word == "person":
            value = f"{self.draw(FIRST)} {self.draw(LAST)}"
        else:
            value = self.draw(WORDS[word])
        # the same slot twice is the same word twice
        self[key] = value
        return value


FIRST = (
    "Anna", "Bela", "Carla", "David", "Edith", "Farid", "Greta", "Henry", "Ines", "Jonas", "Karin", "Louis", "Maria",
    "Nora", "Oskar", "Paula", "Quentin", "Rosa", "Simon", "Tessa", "Ugo", "Vera", "Walter", "Yasmin", "Zeno",
)  # fmt: skip
LAST = (
    "Abel", "Brook", "Castell", "Dorn", "Ekberg", "Falk", "Garner", "Holm", "Irving", "Jansen", "Keller", "Lind",
    "Moreau", "Nagy", "Olsen", "Parker", "Quist", "Rossi", "Steiner", "Tanner", "Ullman", "Varga", "Weber", "Young",
)  # fmt: skip
WORDS: dict[str, Sequence[str]] = {
    "town": ("Ashford", "Belmont", "Crestwood", "Dunmore", "Eastvale", "Fairview", "Glenrock", "Harbour Bay",
             "Ironbridge", "Juniper Hill", "Kingsport", "Lakewood", "Millbrook", "Northfield", "Oakdale", "Pinehurst",
             "Queensbury", "Riverside", "Stonehaven", "Thornton"),
    "office": ("the town council", "the school board", "the fire department", "the harbour office",
               "the public library", "the water company", "the railway", "the hospital", "the weather service",
               "the university", "the museum", "the farmers' union", "the sports club", "the city theatre"),
    "role": ("mayor", "teacher", "engineer", "doctor", "captain", "farmer", "librarian", "coach", "director",
             "spokesperson", "minister", "scientist", "driver", "judge"),
    "thing": ("bridge", "school", "tram line", "park", "harbour wall", "library", "power station", "market hall",
              "swimming pool", "hospital wing", "bicycle path", "railway station", "water tower", "concert hall"),
    "material": ("stone", "steel", "timber", "brick", "glass", "concrete"),
    "event": ("a flood", "a storm", "a fire", "a strike", "an election", "a festival", "a power cut", "a long drought",
              "an early frost", "a football match", "a science fair", "a heat wave"),
    "verb": ("opened", "closed", "repaired", "planned", "approved", "rejected", "visited", "measured", "extended",
             "painted", "sold", "inspected"),
    "month": ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
              "November", "December"),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "size": ("small", "large", "narrow", "wide", "new", "old", "modern", "famous", "quiet", "busy"),
    "people": ("residents", "visitors", "workers", "students", "parents", "shop owners", "passengers", "fishermen",
               "scientists", "voters"),
    "reason": ("because the costs had doubled", "after years of debate", "to save energy", "for reasons of safety",
               "despite heavy rain", "with money from the state", "without any warning", "as part of a larger plan"),
    "opinion": ("a great success", "a serious mistake", "long overdue", "far too expensive", "a step forward",
                "hard to explain", "good for everyone", "the best solution"),
    "animal": ("dog", "cat", "rabbit", "bird", "bear", "fox", "mouse", "frog", "duck", "pony"),
    "name": ("Lily", "Tom", "Mia", "Ben", "Sue", "Max", "Amy", "Tim", "Zoe", "Sam"),
    "toy": ("ball", "kite", "doll", "boat", "drum", "book", "hat", "train", "box", "bell"),
    "color": ("red", "blue", "green", "yellow", "big", "little", "shiny", "soft"),
    "place": ("park", "garden", "house", "forest", "beach", "kitchen", "school", "hill", "river", "barn"),
    "feeling": ("happy", "sad", "scared", "proud", "tired", "glad", "angry", "excited"),
    "food": ("cake", "soup", "bread", "an apple", "a cookie", "milk", "honey", "a pear"),
    "act": ("ran", "jumped", "laughed", "sang", "danced", "cried", "smiled", "waited"),
}  # fmt: skip
NEWS = (
    "On {day}, {office} of {town} {verb} the {size} {thing} {reason}.",
    "The {thing} was built of {material} in {year} and is used by {number} thousand {people} a year.",
    "{person}, {role} of {town}, called the decision {opinion}.",
    '"This is {opinion}," said {person}, who has lived in {town} for {number} years.',
    "According to {office}, the work will take {number} months and cost {number2} million.",
    "In {month} {year}, {event} had damaged the {thing} and {number} houses near it.",
    "About {number} percent of the {people} who were asked agreed with {office}.",
    "{office} and {office2} have not yet said who will pay for the {thing}.",
    "Police counted {number} {people} at the {thing} on {day} evening.",
    "The {role} said that {event} was expected before the end of {month}.",
    "Similar plans in {town} failed in {year} {reason}.",
    "It is not known how many {people} were affected by {event}.",
    "Since {year} the {thing} has been {verb}, sold and {verb2} again.",
    "{person} won the election against {person2} with {number} percent of the votes.",
    "The next meeting of {office} takes place in {town} on {day}, {number} {month}.",
)
STORY_STARTS = (
    "Once upon a time, there was a little {animal} named {name}.",
    "One day, {name} went to the {place} with a {color} {toy}.",
    "{name} was a {color} {animal} who lived near the {place}.",
)
STORY = (
    "{name} loved to play with the {color} {toy}.",
    "{name} saw a {animal2} in the {place}.",
    "The {animal2} was very {feeling}.",
    '"Can I play with you?" asked the {animal2}.',
    '"Yes, you can," said {name}.',
    "They {act} and {act2} all day.",
    "Then the {toy} fell into the {place}.",
    "{name} was {feeling} and did not know what to do.",
    'Her mom said, "Do not be {feeling}, we can find the {toy}."',
    "They looked in the {place} and they looked in the {place2}.",
    "The {animal2} found the {toy} and gave it to {name}.",
    "{name} ate {food} and went to sleep.",
    "{name} and the {animal2} were friends.",
)
STORY_ENDS = ("The end.", "They lived happily ever after.", "And {name} was {feeling} again.")
LINES = (
    "I pray you, {name}, tell me of the {place}.",
    "What, is the {color} {toy} lost again?",
    "No more of this; the {animal} hath {act} enough.",
    "We shall to {town} on {day}, and there make peace.",
    "My lord, {office} doth send you {food}.",
)


def sentence(text: str) -> str:
    """Return the text with a capital letter."""
    return text[0].upper() + text[1:]


def article(draw: Draw) -> dict[str, str]:
    """Return a news article: text of about 1,200 characters, title and address."""
    town, role = draw(WORDS["town"]), draw(WORDS["role"])
    thing = draw(WORDS["thing"])
    paragraphs = []
    for _ in range(draw.number(2, 5)):
        # a paragraph is about one town and one thing most of the time
        given = {"town": town, "thing": thing, "role": role} if draw.random() < 0.7 else {}
        paragraphs.append(" ".join(sentence(draw.fill(draw(NEWS), **given)) for _ in range(draw.number(2, 6))))
    title = sentence(draw.fill("{office} of {town} plans a {size} {thing}", town=town, thing=thing))
    number = draw.number(10_000, 99_999)
    return {"text": "\n\n".join(paragraphs), "title": title, "url": f"https://news.example/{number}"}


def articles(count: int, seed: int | str) -> list[dict[str, str]]:
    """Return that many news articles."""
    draw = Draw(f"articles {seed}")
    return [article(draw) for _ in range(count)]


def stories(count: int, seed: int | str) -> list[str]:
    """Return that many stories for children, of about 400 characters each."""
    draw, made = Draw(f"stories {seed}"), []
    for _ in range(count):
        given = {key: draw(WORDS[key]) for key in ("name", "animal", "toy", "place")}
        given["animal2"] = draw([a for a in WORDS["animal"] if a != given["animal"]])
        middle = [draw(STORY) for _ in range(draw.number(5, 11))]
        lines = [draw(STORY_STARTS), *middle, draw(STORY_ENDS)]
        made.append(" ".join(draw.fill(line, **given) for line in lines))
    return made


def play(lines: int, seed: int | str) -> str:
    """Return a play of that many lines: speakers in capitals, an empty line after each speech."""
    draw, text = Draw(f"play {seed}"), []
    while len(text) < lines:
        text.append(f"{draw(FIRST).upper()}:")
        text += [draw.fill(draw(LINES)) for _ in range(draw.number(1, 4))]
        text.append("")
    return "\n".join(text[:lines]) + "\n"


def encyclopaedia(count: int, seed: int | str) -> list[tuple[str, str]]:
    """Return (title, text) of that many articles in the form of WikiText: headings between equals signs."""
    made = []
    for page in articles(count, f"encyclopaedia {seed}"):
        first, *rest = page["text"].split("\n\n")
        body = [first] + [part for i, text in enumerate(rest) for part in (f" = = Section {i + 1} = = ", text)]
        made.append((page["title"], "\n".join(f" {part.strip()} " for part in body)))
    return made
