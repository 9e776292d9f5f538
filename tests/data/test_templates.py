import pytest
from transformers import PreTrainedTokenizerFast

from lowrank_cli.data import templates
from lowrank_cli.data.conversations import SAID, Record, Turn, read_conversation
from lowrank_cli.data.tokenizer import named_tokenizer
from lowrank_cli.errors import MissingError, UsageError

PLAIN = Record("a.jsonl, line 1", (Turn("Add.", "", "5"),))
ABOUT = Record("a.jsonl, line 2", (Turn("Add.", "2 and {3}", "5 {input}"),))
TALK = Record("a.jsonl, line 3", (Turn("Hello?", "", "Hi."), Turn("And?", "", "No.")), system="Be short.")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer(test_data) -> PreTrainedTokenizerFast:
    return named_tokenizer(str(test_data / "tokenizers" / "gpt2"))


@pytest.fixture
def chat(test_data):
    loaded = named_tokenizer(str(test_data / "tokenizers" / "gpt2"))
    loaded.chat_template = CHATML
    return loaded


def parts(text):
    return [[(segment.text, segment.target) for segment in part] for part in text.parts]


def test_alpaca_is_the_published_prompt(tokenizer):
    template = templates.load("alpaca", tokenizer)
    assert parts(template.render(PLAIN)) == [[
        ("Below is an instruction that describes a task. Write a response that appropriately completes the request."
         "\n\n### Instruction:\nAdd.\n\n### Response:\n", False),
        ("5", True),
    ]]  # fmt: skip
    (part,) = parts(template.render(ABOUT))
    assert part[0][0] == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n2 and {3}\n\n"
        "### Response:\n"
    )
    # braces of a record are text
    assert part[1] == ("5 {input}", True)


def test_qa_puts_the_answer_on_the_line_of_its_question(tokenizer):
    template = templates.load("qa", tokenizer)
    assert parts(template.render(PLAIN)) == [[("Question: Add.\nAnswer:", False), (" 5", True)]]
    assert parts(template.render(ABOUT))[0][0][0] == "2 and {3}\nQuestion: Add.\nAnswer:"


def test_a_conversation_is_learned_turn_by_turn(tokenizer):
    assert parts(templates.load("plain", tokenizer).render(TALK)) == [
        [("Be short.\n\nHello?\n", False), ("Hi.", True)],
        [("And?\n", False), ("No.", True)],
    ]


def test_auto_is_qa_for_a_task_then_chat_then_alpaca(tokenizer, chat):
    assert templates.load("auto", tokenizer).name == "alpaca"
    assert templates.load("auto", chat).name == "chat"
    assert templates.load("auto", chat, task=True).name == "qa"


def test_chat_is_what_the_tokenizer_renders_with_the_assistant_as_target(chat):
    text = templates.load("chat", chat).render(TALK)
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "No."},
    ]
    (segments,) = parts(text)
    assert "".join(piece for piece, _ in segments) == chat.apply_chat_template(messages, tokenize=False)
    assert [piece for piece, target in segments if target] == ["Hi.<|im_end|>\n", "No.<|im_end|>\n"]
    asked = chat.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert "".join(piece for piece, _ in segments[:-1]) == asked
    assert not text.bos
    # <|im_end|> is not this tokenizer's end of text
    assert text.eos


def test_nothing_is_learned_after_the_end_of_text_of_a_chat_template(chat):
    chat.chat_template = CHATML.replace("<|im_end|>", "<|endoftext|>")
    text = templates.load("chat", chat).render(TALK)
    assert not text.eos
    (segments,) = parts(text)
    assert [piece for piece, target in segments if target] == ["Hi.<|endoftext|>", "No.<|endoftext|>"]
    assert segments[-1][1]
    assert segments[2] == ("\n", False)


def test_a_chat_template_that_rewrites_what_was_said_is_refused(chat):
    chat.chat_template = "{{ messages | length }}" + CHATML
    with pytest.raises(UsageError, match="a.jsonl, line 1") as caught:
        templates.load("chat", chat).render(PLAIN)
    assert "alpaca" in caught.value.hint


# in the manner of Qwen3: only what is said after the last request keeps its thoughts
THINKING = (
    "{% set seen = namespace(asked=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set seen.asked = loop.index0 %}{% endif %}{% endfor %}"
    "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}"
    "{% if loop.index0 > seen.asked %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    "{% else %}{{ m.content }}{% endif %}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_a_chat_template_that_drops_earlier_thoughts_is_learned_where_it_writes_what_it_will_write(chat):
    chat.chat_template = THINKING
    text = templates.load("chat", chat).render(TALK)
    assert parts(text) == [[
        ("system: Be short.<|endoftext|>\nuser: Hello?<|endoftext|>\nassistant: Hi.<|endoftext|>\n"
         "user: And?<|endoftext|>\nassistant: ", False),
        ("<think></think>No.<|endoftext|>", True),
    ]]  # fmt: skip
    assert text.unlearned == 1


def test_a_chat_template_that_drops_what_the_last_answer_says_is_refused(chat):
    chat.chat_template = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
    assert templates.load("chat", chat).render(PLAIN)
    thought = Record("here", (Turn("Add.", "", "<think>\nTwo and three.\n</think>\n\n5"),))
    with pytest.raises(UsageError, match="here: .* leaves out a part of an answer"):
        templates.load("chat", chat).render(thought)
    # white space is the template's own
    chat.chat_template = CHATML.replace("m.content", "m.content | replace('\n', ' ') | trim")
    assert templates.load("chat", chat).render(thought)


def test_each_step_after_the_last_request_is_learned(chat):
    chat.chat_template = THINKING
    call = {"name": "clock", "arguments": {}}
    text = templates.load("chat", chat).render(
        read_conversation(
            {
                "messages": [
                    *({"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}),
                    {"role": "user", "content": "What time is it?"},
                    {"role": "assistant", "content": "", "reasoning_content": "Look.", "tool_calls": [call]},
                    *({"role": "tool", "content": "12:00"}, {"role": "assistant", "content": "Noon."}),
                ],
                "tools": [{"name": "clock"}],
            },
            "messages",
            "here",
        )
    )
    (segments,) = parts(text)
    assert "".join(piece for piece, _ in segments).startswith('tools: [{"name": "clock"}]\nuser: Hello?')
    targets = [piece for piece, target in segments if target]
    assert targets[0].startswith('<think>Look.</think>[{"type": "function"')
    assert targets[1:] == ["<think></think>Noon.<|endoftext|>"]
    assert text.unlearned == 1


def test_an_answer_of_weight_zero_is_not_learned_by_any_template(chat, tokenizer):
    turns = (Turn("Hello?", "", "Hi.", learned=False), Turn("And?", "", "No."))
    for name, loaded in (("chat", chat), ("plain", tokenizer)):
        text = templates.load(name, loaded).render(Record("here", turns))
        pieces = [piece for part in parts(text) for piece in part]
        assert [piece.strip() for piece, target in pieces if target] in (["No."], ["No.<|im_end|>"])
        assert "Hi." in "".join(piece for piece, _ in pieces)


@pytest.mark.parametrize(
    ("beside", "what"),
    [
        ({"tools": [{"name": "clock"}]}, "the tools"),
        ({"reasoning_content": "Hm."}, "what an answer has beside"),
        ({"tool_calls": [{"name": "clock"}]}, "what an answer has beside"),
        ({"result": "12:00"}, "the tools' results"),
    ],
)
def test_a_chat_template_that_leaves_something_out_is_refused(beside, what, chat):
    chat.chat_template = CHATML.replace("{{ m.content }}", "{% if m.role != 'tool' %}{{ m.content }}{% endif %}")
    if "result" in beside:
        chat.chat_template = "{% for m in messages %}{% if m.role != 'tool' %}{{ m.content }}{% endif %}{% endfor %}"
    answer = {"role": "assistant", "content": "Noon.", **{k: v for k, v in beside.items() if k in SAID}}
    messages = [{"role": "user", "content": "What time is it?"}, answer]
    if "result" in beside:
        messages[1:1] = [{"role": "tool", "content": beside["result"]}]
    record = read_conversation({"messages": messages, "tools": beside.get("tools")}, "messages", "here")
    with pytest.raises(UsageError, match=f"here: .* leaves out {what}"):
        templates.load("chat", chat).render(record)


@pytest.mark.parametrize("messages", ["{{ messages[7].role }}", "{{ 1 / 0 }}", "{{ {}['a'] }}{{ none.x.y }}"])
def test_whatever_a_chat_template_raises_names_the_record(messages, chat):
    chat.chat_template = messages
    with pytest.raises(UsageError, match="line 1"):
        templates.load("chat", chat).render(PLAIN)


def test_a_chat_template_that_refuses_names_the_record(chat):
    chat.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(UsageError, match="line 3.*no system here"):
        templates.load("chat", chat).render(TALK)


def test_a_tokenizer_without_a_chat_template_is_said(tokenizer):
    with pytest.raises(UsageError, match="no chat template"):
        templates.load("chat", tokenizer)


def test_a_file_of_ones_own(tokenizer, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text('prompt: "<{instruction}> {{}} "\nresponse: "= {response}"\n')
    text = templates.load(str(path), tokenizer).render(ABOUT)
    # without a prompt for it the input stands under the instruction
    assert parts(text) == [[("<Add.\n\n2 and {3}> {} ", False), ("= 5 {input}", True)]]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("response: '{response}'", "has no prompt"),
        ("prompt: 3", "not text"),
        ("prompt: hello", "lacks {instruction}"),
        ("prompt: '{instruction} {output}'", "unknown field 'output'"),
        ("prompt: '{instruction} {'", "prompt in"),
        ("prompt: '{instruction}'\npromt: x", "unknown key 'promt'"),
        ("prompt: '{instruction}'\nprompt_with_input: '{instruction}'", "lacks {input}"),
        ("- a", "holds no settings"),
    ],
)
def test_a_broken_file_says_what_is_wrong(content, words, tokenizer, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(UsageError) as caught:
        templates.load(str(path), tokenizer)
    assert words in caught.value.message
    assert str(path) in caught.value.message


def test_unknown_templates_and_missing_files(tokenizer):
    with pytest.raises(UsageError, match="unknown template 'alpacca'") as caught:
        templates.load("alpacca", tokenizer)
    assert "did you mean 'alpaca'" in caught.value.hint
    with pytest.raises(MissingError, match="no template file"):
        templates.load("none.yaml", tokenizer)


@pytest.mark.parametrize("name", [n for n in templates.names() if n != "chat"])
def test_every_shipped_template_renders(name, tokenizer):
    for record in (PLAIN, ABOUT, TALK):
        text = templates.load(name, tokenizer).render(record)
        for turn, part in zip(record.turns, text.parts, strict=True):
            assert [segment.target for segment in part] == [False, True]
            assert turn.instruction in part[0].text
            assert turn.input in part[0].text
            assert part[1].text.strip() == turn.response
