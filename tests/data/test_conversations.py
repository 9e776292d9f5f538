import json

import pytest
from pyarrow import Table, parquet

from lowrank_cli.data import instructions, supervised
from lowrank_cli.data.conversations import Turn, read_conversation
from lowrank_cli.data.tokenizer import named_tokenizer
from lowrank_cli.errors import UsageError
from lowrank_cli.settings.finetune import TaskConfig
from lowrank_cli.settings.training import DataConfig

ASK, SAY = {"role": "user", "content": "What time is it?"}, {"role": "assistant", "content": "Noon."}
CALL = {"type": "function", "id": "1", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "12:00", "tool_call_id": "1"}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


def read(*messages, **beside):
    return read_conversation({"messages": list(messages), **beside}, "messages", "here")


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_developer_is_the_system(role):
    record = read({"role": role, "content": "Be brief."}, ASK, SAY)
    assert (record.system, record.turns, record.chat) == ("Be brief.", (Turn("What time is it?", "", "Noon."),), None)
    assert read(ASK, SAY, system="Be brief.") == record


@pytest.mark.parametrize(("key", "value"), [("weight", 0), ("weight", 0.0), ("train", False), ("loss", False)])
def test_an_answer_of_weight_zero_is_context(key, value):
    other = {"role": "assistant", "content": "One.", key: value}
    record = read(ASK, other, ASK, {**SAY, key: 1}, ASK, {**other, "content": "Two."})
    # what follows the last learned answer decides nothing
    assert record.turns == (Turn("What time is it?", "", "One.", learned=False), Turn("What time is it?", "", "Noon."))


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "What time "}, {"type": "text", "text": "is it?"}]
    assert read({"role": "user", "content": parts}, SAY) == read(ASK, SAY)


@pytest.mark.parametrize(
    ("messages", "learned", "why"),
    [
        ((ASK, CALLS, RESULT, SAY), (1, 3), "'tool_calls'"),
        ((ASK, CALLS), (1,), "'tool_calls'"),
        ((ASK, ASK, SAY), (2,), "messages of user, user, assistant"),
        ((SAY, ASK, SAY), (2,), "messages of assistant, user, assistant"),
        ((ASK, {**CALLS, "weight": 0}, RESULT, SAY), (3,), "'tool_calls'"),
        ((ASK, {**SAY, "reasoning_content": "Hm."}), (1,), "'reasoning_content'"),
        ((ASK, SAY, {"role": "system", "content": "Stop."}, ASK, SAY), (1, 4), "messages of user, assistant, system"),
    ],
)
def test_what_turns_do_not_say_is_for_a_chat_template(messages, learned, why):
    record = read(*messages)
    assert record.turns == ()
    assert record.chat.learned == learned
    assert record.chat.why.startswith(why)
    assert len(record.chat.messages) == len(messages)
    assert all(isinstance(message["content"], str) for message in record.chat.messages)


def test_calls_of_tools_are_read_alike_in_each_way_to_write_them():
    texts = {"name": "clock", "arguments": json.dumps(CALL["function"]["arguments"])}
    wanted = [{"type": "function", "function": CALL["function"]}]
    for message in (
        {"role": "assistant", "tool_calls": [{"type": "function", "function": texts}]},
        {"role": "assistant", "content": "", "function_call": texts},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
    ):
        assert read(ASK, message).chat.messages[1]["tool_calls"] == wanted
    for tools in ([CLOCK], json.dumps([CLOCK])):
        assert read(ASK, SAY, tools=tools).chat.tools == (CLOCK,)


def test_a_parquet_file_of_messages_reads_as_the_json_of_the_same_shape(write, tmp_path):
    parts = [{"type": "text", "text": "Be brief."}]
    rows = [
        {"messages": [{**ASK, "content": f"Question {i}"}, CALLS, RESULT, {**SAY, "weight": 1}], "system": ""}
        for i in range(3)
    ]
    rows += [{"messages": [{**ASK, "content": f"Question {i}"}, SAY], "system": "Be brief."} for i in range(3, 6)]
    listed = [{"messages": [{"role": "system", "content": parts}, {"role": "user", "content": parts},
                            {"role": "assistant", "content": parts}]} for _ in range(2)]  # fmt: skip
    for name, records in (("a", rows), ("b", listed)):
        parquet.write_table(Table.from_pylist(records), tmp_path / f"{name}.parquet")
        read = []
        for path in (write(f"{name}.jsonl", records), tmp_path / f"{name}.parquet"):
            config = DataConfig(dataset=str(path), validation_dataset=str(path))
            read.append([(r.turns, r.system, r.chat) for r in instructions.load(config, TaskConfig()).train])
        assert read[0] == read[1]
        assert len(read[0]) == len(records)


@pytest.mark.parametrize("odd", [(ASK, CALLS), (ASK, ASK, SAY), (SAY, ASK, SAY), (ASK, CALLS, RESULT, SAY)])
def test_a_conversation_that_a_template_cannot_write_is_left_out_when_told(odd, write, test_data):
    tokenizer = named_tokenizer(str(test_data / "tokenizers" / "gpt2"))
    rows = [{"messages": [{**ASK, "content": f"Question {i}"}, SAY]} for i in range(8)]
    config, said = DataConfig(dataset=str(write("a.jsonl", [*rows[:3], {"messages": odd}, *rows[3:]]))), []
    options = {"batch_size": 1, "total_batch_size": 1, "eval_tokens": 100, "seed": 0, "tokenizer": tokenizer}
    with pytest.raises(UsageError, match=r"a\.jsonl, line 4: .* only a chat template") as caught:
        supervised.build(config, TaskConfig(template="plain", validation_share=0.2), **options)
    assert "--skip-bad" in caught.value.hint
    task = TaskConfig(template="plain", validation_share=0.2, skip_bad=True)
    data = supervised.build(config, task, **options, status=said.append)
    assert data.description["skipped"] == 1
    assert data.description["records"] + data.description["validation_records"] == 8
    (line,) = [line for line in said if "left out" in line]
    assert "1 bad records left out, the first is" in line
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ m.tool_calls }}\n{% endfor %}"
    data = supervised.build(config, TaskConfig(template="chat", validation_share=0.2), **options)
    assert data.description["records"] + data.description["validation_records"] == 9


def test_an_answer_without_content_is_empty():
    with pytest.raises(UsageError, match="here: the response is empty"):
        read(ASK, {**SAY, "content": " "})
