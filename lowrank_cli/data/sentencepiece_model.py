"""A `tokenizers` tokenizer from a SentencePiece .model file (T5, Llama 1 and 2), without sentencepiece or protobuf.

The file is one protocol-buffer message, ModelProto of sentencepiece_model.proto; only the fields used here are read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from struct import unpack

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lowrank_cli.errors import UsageError

UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # SentencePiece.Type
SPACE = "\u2581"


@dataclass
class _Model:
    pieces: list[tuple[str, float, int]]  # piece, score, type
    model_type: int = UNIGRAM
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True


def read_sentencepiece(path: Path) -> Tokenizer:
    """The tokenizer of a SentencePiece file, giving the ids that sentencepiece gives.

    The special tokens follow the model families the files come from: a BPE model with <s> starts a text with it
    (Llama), a Unigram model ends a text with </s> (T5).

    Args:
        path: a Unigram or BPE model, such as spiece.model or tokenizer.model.
    Raises:
        UsageError: not such a file.
    """
    try:
        model = _parse(path.read_bytes())
    except (IndexError, ValueError) as error:
        raise UsageError(f"{path} is not a SentencePiece model", "give its tokenizer.json instead") from error
    if not model.pieces or model.model_type not in (UNIGRAM, BPE):
        raise UsageError(f"{path} is not a Unigram or BPE SentencePiece model", "give its tokenizer.json instead")
    kinds = [kind for _, _, kind in model.pieces]
    byte_fallback, unk = BYTE in kinds, kinds.index(UNKNOWN) if UNKNOWN in kinds else 0
    if model.model_type == UNIGRAM:
        vocabulary = [(piece, score) for piece, score, _ in model.pieces]
        tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=unk, byte_fallback=byte_fallback))
    else:
        tokenizer = Tokenizer(
            models.BPE(
                {piece: i for i, (piece, _, _) in enumerate(model.pieces)},
                _merges(model),
                unk_token=model.pieces[unk][0],
                fuse_unk=True,
                byte_fallback=byte_fallback,
            )
        )
    tokenizer.normalizer = _normalizer(model)
    if model.remove_extra_whitespaces:
        prepend = "always" if model.add_dummy_prefix else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=prepend, split=True)
    strip = [decoders.Strip(" ", 1, 0)] if model.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    special = [p for p, _, kind in model.pieces if kind in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(p, normalized=False, special=True) for p in special])
    user = [AddedToken(p, normalized=False) for p, _, kind in model.pieces if kind == USER_DEFINED]
    tokenizer.add_tokens(user)
    bos, eos = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    if model.model_type == BPE and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bos)]
        )
    elif model.model_type == UNIGRAM and eos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", eos)]
        )
    return tokenizer


def _normalizer(model: _Model) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        # the pre-tokenizer puts the space in front
        return normalizers.Sequence([*steps, normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")])
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _merges(model: _Model) -> list[tuple[str, str]]:
    # sentencepiece merges the pair whose result scores best: merges in the order of the results' scores
    scores = {piece: (score, -i) for i, (piece, score, _) in enumerate(model.pieces)}
    ids = {piece: i for i, piece in enumerate(scores)}
    merges = []
    for piece in sorted(scores, key=scores.__getitem__, reverse=True):
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        pairs = [pair for pair in halves if pair[0] in scores and pair[1] in scores]
        merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


def _parse(data: bytes) -> _Model:
    model = _Model([])
    for field, value in _fields(data):
        if field == 1:
            piece = {1: b"", 2: bytes(4), 3: 1} | dict(_fields(value))
            model.pieces.append((piece[1].decode(), unpack("<f", piece[2])[0], piece[3]))
        elif field == 2:
            model.model_type = dict(_fields(value)).get(3, UNIGRAM)
        elif field == 3:
            spec = dict(_fields(value))
            model.charsmap = spec.get(2, b"")
            model.add_dummy_prefix = bool(spec.get(3, 1))
            model.remove_extra_whitespaces = bool(spec.get(4, 1))
    return model


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    # protobuf wire format: a varint key of field number and wire type, then the value
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
        elif kind in (1, 2, 5):
            size, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value, at = data[at : at + size], at + size
            if at > len(data):
                raise ValueError("truncated")
        else:
            raise ValueError("not a protocol buffer")
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
