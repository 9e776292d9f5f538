"""Answers to MT-Bench as FastChat's judge reads them."""

import json

import pytest

from lowrank_cli.errors import MissingError, PreflightError, UsageError
from lowrank_cli.evaluate import mt_bench

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Once upon a time", "And then?"]},
    {"question_id": 111, "category": "math", "turns": ["One plus one is"]},
]


def write(subject, path, questions=None, seed=0, **settings):
    settings = {"max_new_tokens": 12, "model_id": "stories", "template": "plain", **settings}
    written = mt_bench.write_answers(subject, questions or QUESTIONS, path, seed=seed, **settings)
    return written, [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def turns(answers):
    return {answer["question_id"]: answer["choices"][0]["turns"] for answer in answers}


def test_answers_have_fastchats_format(subject, tmp_path):
    written, answers = write(subject, tmp_path / "a" / "stories.jsonl")
    assert written == 2
    for answer, question in zip(answers, QUESTIONS, strict=True):
        assert set(answer) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert answer["question_id"] == question["question_id"]
        assert answer["model_id"] == "stories"
        assert [choice["index"] for choice in answer["choices"]] == [0]
        assert len(answer["choices"][0]["turns"]) == len(question["turns"])
    assert len({answer["answer_id"] for answer in answers}) == 2


def test_interrupted_file_goes_on_as_it_would_have(subject, tmp_path):
    _, whole = write(subject, tmp_path / "whole.jsonl")
    path = tmp_path / "part.jsonl"
    path.write_text(json.dumps(whole[0]) + '\n{"question_id": 111, "ans', encoding="utf-8")
    written, answers = write(subject, path)
    assert written == 1
    assert turns(answers) == turns(whole)
    assert answers[0] == whole[0]


def test_seed_decides_draws_and_nothing_else_does(subject, tmp_path):
    long = {"max_new_tokens": 40}
    _, first = write(subject, tmp_path / "a.jsonl", **long)
    _, other = write(subject, tmp_path / "b.jsonl", questions=QUESTIONS[::-1], **long)
    assert turns(first) == turns(other)
    _, drawn = write(subject, tmp_path / "c.jsonl", seed=1, **long)
    assert turns(drawn)[81] != turns(first)[81]
    # of temperature 0
    assert turns(drawn)[111] == turns(first)[111]


def test_second_turn_sees_the_first(subject):
    from lowrank_cli.data import templates
    from lowrank_cli.data.instructions import Turn

    template = templates.load("alpaca", subject.tokenizer)
    said = [Turn("Tell a story.", "", "A cat sat."), Turn("And then?", "", "")]
    text = subject.tokenizer.decode(mt_bench._prompt(subject, template, said))
    places = [text.index(part) for part in ("Tell a story.", "A cat sat.", "And then?")]
    assert places == sorted(places)
    assert text.rstrip().endswith("### Response:")


def test_answers_need_room(subject, tmp_path):
    with pytest.raises(PreflightError, match="no room for an answer of 512"):
        write(subject, tmp_path / "a.jsonl", max_new_tokens=512)


def test_broken_questions_are_named(tmp_path):
    with pytest.raises(UsageError, match="needs its questions"):
        mt_bench.read_questions(None, None)
    with pytest.raises(MissingError, match="no file"):
        mt_bench.read_questions(str(tmp_path / "q.jsonl"), None)
    path = tmp_path / "q.jsonl"
    good = json.dumps(QUESTIONS[0])
    for bad in ("{", "3", '{"turns": ["a"]}', '{"question_id": 1, "turns": [1]}', '{"question_id": 1, "turns": []}',
                '{"question_id": [1], "turns": ["a"]}', '{"turns": ' + "[" * 3000 + "]" * 3000 + "}"):  # fmt: skip
        path.write_text(f"{good}\n\n{bad}\n", encoding="utf-8")
        with pytest.raises(UsageError, match="line 3"):
            mt_bench.read_questions(str(path), None)
    # a line separator inside a question ends no line
    path.write_text(f"{good}\n{good.replace('Once', chr(0x2028))}\n", encoding="utf-8")
    assert len(mt_bench.read_questions(str(path), 1)) == 1
