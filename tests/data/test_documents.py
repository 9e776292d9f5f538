import bz2
import csv
import errno
import gzip
import json
from dataclasses import replace

import pyarrow
import pytest
from pyarrow import parquet

from lowrank_cli.data.documents import open_source
from lowrank_cli.data.records import pieces
from lowrank_cli.errors import MissingError, UsageError
from lowrank_cli.settings.training import DataConfig


def parts(dataset, **settings):
    config = DataConfig(dataset=str(dataset), **settings)
    return list(open_source(config)), list(open_source(config, "validation"))


def test_stdlib_is_ten_megabytes_in_disjoint_parts_with_a_position():
    sources = [open_source(DataConfig(), part) for part in ("train", "validation")]
    for source in sources:
        for path in source.files:
            assert not {"test", "tests", "site-packages"} & set(path.parts)
    train, validation = map(list, sources)
    assert 8e6 < sum(map(len, train)) < 16e6
    assert 0.01 < len(validation) / len(train) < 0.1
    long = {text for text in train if len(text) > 200}
    assert long.isdisjoint(validation)
    assert any("class Counter(dict)" in text for text in train + validation)
    reading = iter(sources[0])
    assert [next(reading) for _ in range(300)] == train[:300]
    again = [open_source(DataConfig(), part) for part in ("train", "validation")]
    again[0].load_state_dict(json.loads(json.dumps(sources[0].state_dict())))
    assert list(again[0]) == train[300:]
    assert [list(source) for source in again] == [train, validation]


def test_folder_uses_its_own_validation_file(test_data):
    texts = []
    for part in ("train", "validation"):
        lines = gzip.decompress((test_data / "wikinews_en" / f"{part}.json.gz").read_bytes()).splitlines()
        texts.append([json.loads(line)["text"] for line in lines])
    assert parts(test_data / "wikinews_en") == tuple(texts)


def test_validation_dataset_replaces_the_held_out_documents(write, documents):
    main = write("a.jsonl", [{"text": t} for t in documents])
    other = write("b.jsonl", [{"text": t + "!"} for t in documents[:30]])
    train, validation = parts(main, validation_dataset=str(other))
    assert train == documents
    assert validation == [t + "!" for t in documents[:30]]


@pytest.mark.parametrize(
    "name",
    [
        *("a.jsonl", "a.json", "a.json.gz", "a.jsonl.gz", "list.json", "list.json.gz", "a.csv", "a.csv.gz"),
        *("a.jsonl.bz2", "a.json.xz", "a.csv.bz2", "a.parquet"),
    ],
)
def test_every_format_gives_the_same_documents(name, write, tmp_path, documents):
    texts = [t + '\n\n"quoted", é' for t in documents]
    records = [{"id": i, "body": t} for i, t in enumerate(texts)]
    if name == "a.parquet":
        parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / name, row_group_size=7)
    elif name.startswith("a.csv"):
        opener = {"gz": gzip.open, "bz2": bz2.open}.get(name.rpartition(".")[2], open)
        with opener(tmp_path / name, "wt", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["id", "body"])
            writer.writeheader()
            writer.writerows(records)
    else:
        write(name, json.dumps(records, indent=1) if name.startswith("list") else records)
    train, validation = parts(tmp_path / name, text_field="body")
    assert train == [t for i, t in enumerate(texts) if i % 20 != 1]
    assert validation == [t for i, t in enumerate(texts) if i % 20 == 1]


def test_text_pieces_join_to_the_text_and_are_cut_at_blank_lines(test_data):
    text = (test_data / "tinyshakespeare" / "input.txt").read_text()
    cut = list(pieces(text.splitlines(keepends=True)))
    assert "".join(cut) == text
    assert max(map(len, cut)) <= 20_000
    assert all(piece.endswith("\n\n") for piece in cut[:-1])
    train, validation = parts(test_data / "tinyshakespeare" / "input.txt")
    assert sum(map(len, train + validation)) == len(text)


@pytest.mark.parametrize("lines", [["a" * 9 + "\n"] * 5, ["abc\n", "\n", "x" * 10, "y" * 10, "z\n"], ["\n"] * 30])
def test_text_without_blank_lines_is_cut_at_lines(lines):
    cut = list(pieces(lines, limit=10))
    assert "".join(cut) == "".join(lines)
    assert max(map(len, cut)) <= 10


def test_folder_parts_by_name_of_file_and_folder(write, tmp_path):
    for name in ("a.txt", "b/train-0.txt", "validation/c.txt", "test/d.txt", "my-valid.txt", "evaluated.txt"):
        write(name, name)
    write(".hidden.txt", "no")
    write("notes.md", "no")
    train, validation = parts(tmp_path)
    assert train == ["a.txt", "b/train-0.txt", "evaluated.txt"]
    assert validation == ["my-valid.txt", "validation/c.txt"]


def test_linked_folders_are_read_each_real_one_once(write, tmp_path):
    for name in ("data/a/x.txt", "data/train/y.txt", "elsewhere/deep/z.txt", "beside.txt"):
        write(name, name)
    links = {"data/b": "elsewhere", "data/again": "data/train", "data/c.txt": "beside.txt"}
    for link, target in (links | {"data/a/up": "data", "data/above": ".", "elsewhere/loop": "elsewhere"}).items():
        (tmp_path / link).symlink_to(tmp_path / target)
    files = open_source(DataConfig(dataset=str(tmp_path / "data"))).files
    found = [path.relative_to(tmp_path / "data").as_posix() for path in files]
    assert found == ["a/x.txt", "b/deep/z.txt", "c.txt", "train/y.txt"]


def test_what_a_folder_holds_and_is_not_read_is_named_once(write, tmp_path, capsys):
    for name in ("a.txt", "b.txt", "c/d.jsonl.zst", "e.ZST", "f.tsv", "LICENSE", ".hidden.zst"):
        write(name, name)
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    assert parts(tmp_path) == (["a.txt"], ["b.txt"])
    assert capsys.readouterr().err == (
        f"{tmp_path}: 5 files are not read: 2 .zst, 1 .tsv, 1 without an ending, "
        "gone.jsonl, which is a broken link or no file\n"
    )


def test_a_folder_that_may_not_be_listed_is_an_error(write, tmp_path, monkeypatch):
    write("a/x.txt", "x")
    original = type(tmp_path).iterdir

    def iterdir(path):
        # what the system says to others than root, whom no mode keeps out
        if path == tmp_path / "a":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(type(tmp_path), "iterdir", iterdir)
    with pytest.raises(UsageError, match="a cannot be read: Permission denied"):
        open_source(DataConfig(dataset=str(tmp_path)))


def test_test_files_are_validation_when_there_is_nothing_better(write, tmp_path):
    write("train.txt", "t")
    write("test.txt", "e")
    assert parts(tmp_path) == (["t"], ["e"])


def test_blank_and_null_texts_are_skipped(write):
    path = write("a.jsonl", [{"text": t} for t in ["a", "b", " ", None, "c"]])
    assert parts(path) == (["a", "c"], ["b"])


@pytest.mark.parametrize("name", ["a.jsonl", "folder"])
def test_position_continues_anywhere_and_a_finished_pass_rewinds(name, write, tmp_path, documents):
    if name == "a.jsonl":
        name = write(name, [{"text": t} for t in documents])
    else:
        for i in range(3):
            write(f"f/{i}.json", [{"text": t} for t in documents[i * 20 : i * 20 + 20]])
        name = tmp_path / "f"
    config = DataConfig(dataset=str(name))
    source = open_source(config)
    everything = list(source)
    count = len(everything)
    for before in (0, 1, 19, 20, count - 1, count):
        source.load_state_dict({})
        reading = iter(source)
        assert [next(reading) for _ in range(before)] == everything[:before]
        state = json.loads(json.dumps(source.state_dict()))
        other = open_source(config)
        other.load_state_dict(state)
        assert list(other) == everything[before:]
        assert list(other) == everything


@pytest.mark.parametrize(("name", "content", "message", "hint"), [
    ("empty.jsonl", "", "empty.jsonl (train) is empty", "--dataset"),
    ("blank.txt", "\n\n", "every text in it is blank", "--dataset"),
    ("broken.jsonl", '{"text": "a"}\n{"text": \n', "broken.jsonl, line 2: not JSON", "one object a line"),
    ("broken.json", '[{"text": "a"},\n{]', "broken.json, line 2: not JSON", "list of objects"),
    ("keys.jsonl", [{"text": "a"}, {"body": "a", "url": "b"}], "line 2: no 'text'; keys: body, url", "--text-field"),
    ("keys.json", '[{"text": "a"}, {"body": "b"}]', "record 2: no 'text'; keys: body", "--text-field"),
    ("keys.csv", "a,b\n1,2\n", "line 2: no 'text'; keys: a, b", "--text-field"),
    ("number.jsonl", [{"text": 3}], "line 1: 'text' is a number, not text", "--text-field"),
    ("string.jsonl", ["a"], "line 1: a record is an object with a 'text' key, not a string", "one object a line"),
    ("letter.docx", "a", "has an ending that is not read here", ".parquet"),
    ("deep.jsonl", '{"text": "a"}\n{"text": "b", "meta": ' + "[" * 3000 + "]" * 3000 + "}\n", "line 2: ", "a line"),
    ("long.json", '[{"text": "a", "meta": ' + "7" * 5000 + "}]", "long.json: Exceeds the limit", "one object a line"),
    ("half.jsonl", '{"text": "a"}\n{"text": "a \\ud83d b"}\n', "line 2: a string holds '\\ud83d'", "pair"),
    ("more.csv", "text,url\na,b\nx, y,b\n", "line 3: 3 cells, and the header has 2", "quotes"),
    ("less.csv", 'text,url\na,b\n"x\ny",b\nz\n', "line 5: 1 cells, and the header has 2", "quotes"),
    ("open.csv", 'text,url\na,b\n"x,b\ny,b\n', "line 3: not CSV", "quotes"),
    ("twice.csv", "text,text\na,b\n", "line 1: the header has 'text' twice", "name"),
    ("unnamed.csv", "text,\na,b\n", "line 1: the header has a column without a name", "name"),
    ("zero.csv", "text,url\na,b\na\0,b\n", "line 3: a NUL byte", "UTF-8"),
    ("zero.txt", "a\nb\n" + "\0" * 50_000, "line 3: a NUL byte", "UTF-8"),
    ("cut.json.bz2", bz2.compress(b'{"text": "a"}' * 1000)[:40], "is not a whole bzip2 file", "bzip2 -t"),
    ("plain.json.bz2", b'{"text": "a"}', "is not a whole bzip2 file", "bzip2 -t"),
    ("plain.json.xz", b'{"text": "a"}', "is not a whole xz file", "xz -t"),
    ("latin.txt", "caf\xe9".encode("latin-1"), "is not UTF-8 text", "UTF-8"),
    ("plain.json.gz", b'{"text": "a"}', "is not a whole gzip file", "gzip -t"),
    ("cut.json.gz", gzip.compress(b'{"text": "a"}' * 1000, mtime=0)[:40], "is not a whole gzip file", "gzip -t"),
    ("broken.parquet", b"PAR1 no", "is not a readable parquet file", "again"),
])  # fmt: skip
def test_errors_name_the_place_and_the_way_out(name, content, message, hint, write):
    path = write(name, content)
    with pytest.raises(UsageError) as caught:
        list(open_source(DataConfig(dataset=str(path))))
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert "\n" not in caught.value.message + caught.value.hint


def test_a_column_of_numbers_that_pandas_wrote_first_needs_no_name(write):
    assert parts(write("a.csv", ",text\n0,a\n1,b\n2,c\n")) == (["a", "c"], ["b"])


def test_a_parquet_file_whose_text_is_no_unicode_is_an_error(tmp_path):
    column = pyarrow.StringArray.from_buffers(2, pyarrow.array([0, 1, 4], pyarrow.int32()).buffers()[1],
                                              pyarrow.py_buffer(b"a\xed\xa0\xbd"))  # fmt: skip
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="a.parquet is not"):
        list(open_source(DataConfig(dataset=str(tmp_path / "a.parquet"))))


def test_parquet_without_the_column_names_those_there(tmp_path):
    parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="no 'text'; keys: body"):
        list(open_source(DataConfig(dataset=str(tmp_path / "a.parquet"))))


def test_one_document_has_no_validation_part(write):
    config = DataConfig(dataset=str(write("a.txt", "one")))
    with pytest.raises(UsageError, match="no validation part") as caught:
        list(open_source(config, "validation"))
    assert "--validation-dataset" in caught.value.hint


def test_folder_without_train_files(write, tmp_path):
    with pytest.raises(UsageError, match="no file that is read here"):
        open_source(DataConfig(dataset=str(tmp_path)))
    write("test.txt", "a")
    with pytest.raises(UsageError, match="only test files"):
        open_source(DataConfig(dataset=str(tmp_path)))


@pytest.mark.parametrize("name", ["nowhere.jsonl", "./nowhere", "/no/where", "a/b/c", "what is this"])
def test_missing_file_is_exit_4(name):
    with pytest.raises(MissingError, match="there is no file or folder") as caught:
        open_source(DataConfig(dataset=name))
    assert caught.value.exit_code == 4
    assert "hub id" in caught.value.hint


def test_identity_follows_content_part_and_field(write, documents):
    path = write("a.jsonl", [{"text": t} for t in documents])
    config = DataConfig(dataset=str(path))
    first = open_source(config).identity
    assert open_source(config).identity == first
    assert open_source(config, "validation").identity != first
    assert open_source(replace(config, text_field="body")).identity != first
    write("a.jsonl", [{"text": t} for t in documents[1:]])
    assert open_source(config).identity != first
