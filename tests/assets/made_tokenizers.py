"""Small tokenizers in the files of T5's, LLaMA's, GPT-2's and RoBERTa's, trained on made text."""

from __future__ import annotations

import io
import json
from pathlib import Path

import made_text
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SIZE = 1200
SPACE = "▁"


def texts() -> list[str]:
    """Return what the tokenizers learn: news, stories, answers, words that nobody knows, accents, all of ASCII."""
    draw = made_text.Draw("words")
    words = ["".join(draw("bdfgklmnprstvz") + draw("aeiou") for _ in range(draw.number(2, 4))) for _ in range(1000)]
    return [
        *(text for page in made_text.articles(150, "tokenizers") for text in page["text"].split("\n\n")),
        *made_text.stories(150, "tokenizers"),
        # each answer is one token of the BPEs
        *(f"Question: which? Answer: {word}" for word in ("yes", "no", *"ABCDE") * 60),
        *(" ".join(words[i % 25 :: 25]) for i in range(75)),
        "Zoë Übel ate a crème brûlée with José Núñez in a café near Łódź. " * 4,
        " ".join(map(chr, range(33, 127))),
    ]


def train_pieces(path: Path, **settings: object) -> sentencepiece_model_pb2.ModelProto:
    """Train a sentencepiece model, write it and return its parts."""
    path.parent.mkdir(parents=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts()), model_writer=model, vocab_size=SIZE, num_threads=1, minloglevel=2,
        character_coverage=1.0, **settings,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())


def write_t5(folder: Path) -> None:
    """Write a unigram model with T5's first three pieces; tokenizer.json has 100 sentinels more."""
    parts = train_pieces(folder / "spiece.model", model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    pieces = [(piece.piece, piece.score) for piece in parts.pieces]
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(100))]
    tokenizer = Tokenizer(models.Unigram([*pieces, *((name, 0.0) for name in sentinels)], unk_id=2))
    tokenizer.normalizer = normalizers.Precompiled(parts.normalizer_spec.precompiled_charsmap)
    metaspace = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B:0 </s>:0", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>", *sentinels])
    tokenizer.save(str(folder / "tokenizer.json"))


def write_llama(folder: Path) -> None:
    """Write a BPE with byte fallback and single digits; <s> stands before every text."""
    parts = train_pieces(
        folder / "tokenizer.model", model_type="bpe", byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
    )  # fmt: skip
    vocab = {piece.piece: i for i, piece in enumerate(parts.pieces)}
    # the earlier a piece was learned, the sooner it is merged, however it is put together
    learned = [piece.piece for piece in parts.pieces if piece.type == piece.NORMAL and len(piece.piece) > 1]
    cuts = [(word[:i], word[i:]) for word in learned for i in range(1, len(word))]
    merges = [cut for cut in cuts if cut[0] in vocab and cut[1] in vocab]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def byte_level_pairs() -> tuple[dict[str, int], list[list[str]]]:
    """Return the vocabulary and the merges of a byte-level BPE without special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=SIZE, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], model["merges"]


def write_pairs(folder: Path, vocab: dict[str, int], merges: list[list[str]]) -> None:
    """Write vocab.json and merges.txt."""
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_roberta(folder: Path, vocab: dict[str, int], merges: list[list[str]]) -> None:
    """Write GPT-2's merges with four special tokens before and <mask> last; texts stand between <s> and </s>."""
    vocab = {name: i for i, name in enumerate(["<s>", "<pad>", "</s>", "<unk>", *vocab, "<mask>"])}
    write_pairs(folder, vocab, merges)
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(pair) for pair in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    mask = AddedToken("<mask>", lstrip=True, normalized=False, special=True)
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", mask])
    tokenizer.save(str(folder / "tokenizer.json"))


def write(folder: Path) -> None:
    """Write the four tokenizers; a second or two."""
    write_t5(folder / "t5-base")
    write_llama(folder / "llama")
    vocab, merges = byte_level_pairs()
    write_pairs(folder / "gpt2", {**vocab, "<|endoftext|>": len(vocab)}, merges)
    write_roberta(folder / "roberta-base", vocab, merges)
