import pytest
from transformers import PreTrainedTokenizerFast

from lowrank_cli.data import templates
from lowrank_cli.data.instructions import Record, Turn
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
