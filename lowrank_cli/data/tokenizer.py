"""The tokenizer of a run: a given one, the model's own, or a byte-level BPE trained on the dataset once and cached."""

from collections.abc import Callable, Iterator
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lowrank_cli import foreign
from lowrank_cli.data.cache import cached_folder, fingerprint
from lowrank_cli.data.documents import Source
from lowrank_cli.data.sentencepiece_model import read_sentencepiece
from lowrank_cli.errors import MissingError, UsageError
from lowrank_cli.settings.training import DataConfig

TRAINING_CHARACTERS = 32_000_000  # a tokenizer is trained on at most this much of the text
FORMS = "--tokenizer takes a folder or file with a tokenizer, or a hub id"
_CONFIGS = ("tokenizer_config.json", "config.json")
_MODELS = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
# for files that do not say which tokens are special; the first one in the vocabulary
_SPECIALS = {
    "bos_token": ("<s>", "<|begin_of_text|>", "<bos>", "[CLS]", "<|endoftext|>"),
    "eos_token": ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>", "<|im_end|>", "[SEP]"),
    "pad_token": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>"),
    "unk_token": ("<unk>", "[UNK]"),
}


def load_tokenizer(
    config: DataConfig,
    source: Source,
    *,
    fallback: str | None = None,
    offline: bool = False,
    status: Callable[[str], None] = lambda _: None,
) -> PreTrainedTokenizerFast:
    """A fast tokenizer that has an end-of-text and a padding token and neither truncates nor pads by itself.

    Args:
        config: tokenizer and vocab_size are used.
        source: the train documents, read only if a tokenizer has to be trained.
        fallback: a model folder whose tokenizer is taken when the configuration names none.
        offline: never touch the network.
        status: told before a tokenizer is trained.
    Raises:
        MissingError: nothing at the name.
        UsageError: what is there is no tokenizer that can be used.
    """
    name = config.tokenizer or fallback
    if name is not None:
        return named_tokenizer(name, offline=offline)
    folder = _trained(source, config.vocab_size, status)
    return _usable(foreign.from_pretrained(PreTrainedTokenizerFast, folder), "the trained tokenizer")


def named_tokenizer(name: str, *, offline: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer of a local folder or file or a hub id; raises as `load_tokenizer` does."""
    return _usable(_named(name, offline), name)


def adds_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Return whether the tokenizer puts its bos token in front of a text by itself."""
    ids = tokenizer.backend_tokenizer.encode("", add_special_tokens=True).ids
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def _trained(source: Source, vocab_size: int, status: Callable[[str], None]) -> Path:
    def make(folder: Path) -> None:
        status(f"training a {vocab_size:,}-entry tokenizer on {source.name}")
        train_tokenizer(source, vocab_size).save_pretrained(folder)

    about = ["byte-level BPE", vocab_size, TRAINING_CHARACTERS, source.identity]
    return cached_folder("tokenizers", fingerprint(about), make)


def train_tokenizer(source: Source, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with <s> (put in front of a text), </s> and <pad>, trained on the source from its position.

    Args:
        source: at most TRAINING_CHARACTERS of it are read; its position is left as it was.
        vocab_size: entries with the three special ones and the 256 bytes.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    before = source.state_dict()
    tokenizer.train_from_iterator(_beginning(source), trainer)
    source.load_state_dict(before)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def _beginning(source: Source) -> Iterator[str]:
    left = TRAINING_CHARACTERS
    for text in source:
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return


def _named(name: str, offline: bool) -> PreTrainedTokenizerFast:
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        foreign.check_gguf(path)
        with foreign.reading(path, "a GGUF file with a tokenizer", "fetch it again, or name another with --tokenizer"):
            return foreign.from_pretrained(
                AutoTokenizer, path.parent, gguf_file=path.name, local_files_only=True
            )  # fmt: skip
    if path.is_file():
        return _from_file(path)
    if path.is_dir():
        return _from_folder(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith((".json", ".model")):
        raise MissingError(f"there is no tokenizer at {name}", FORMS)
    try:
        return foreign.from_pretrained(AutoTokenizer, name, local_files_only=offline)
    except (OSError, ValueError, ImportError) as error:
        way = "run once without --offline, or give a local folder" if offline else "check the id and the network"
        raise MissingError(
            f"no tokenizer at {name}: neither a local path nor "
            f"{'in the cache' if offline else 'one that the hub gives out'}",
            f"{way}; {FORMS}",
        ) from error


def _from_folder(folder: Path) -> PreTrainedTokenizerFast:
    has = {path.name for path in folder.iterdir()}
    if has & set(_CONFIGS) and ("tokenizer.json" in has or not has & set(_MODELS)):
        try:
            with foreign.reading(folder, "a folder with a tokenizer", FORMS):
                return foreign.from_pretrained(AutoTokenizer, folder, local_files_only=True)
        except (UsageError, ImportError) as error:
            if "tokenizer.json" not in has and not {"vocab.json", "merges.txt"} <= has:
                raise MissingError(f"{folder} has no tokenizer that can be loaded", FORMS) from error
    if "tokenizer.json" in has:
        return _from_file(folder / "tokenizer.json")
    if models_here := has & set(_MODELS):
        return _from_file(folder / min(models_here))
    if {"vocab.json", "merges.txt"} <= has:
        return _from_merges(folder)
    raise MissingError(
        f"{folder} has no tokenizer: no tokenizer.json, {', '.join(_MODELS)} or vocab.json with merges.txt", FORMS
    )


def _from_file(path: Path) -> PreTrainedTokenizerFast:
    if path.suffix == ".model":
        return _wrap(read_sentencepiece(path))
    model = foreign.read_json(path, hint=FORMS).get("model")
    if not isinstance(model, dict) or "vocab" not in model:
        raise UsageError(f"{path} is not a tokenizer.json: it has no model with a vocab", FORMS)
    with foreign.reading(path, "a tokenizer.json", FORMS):
        return _wrap(Tokenizer.from_file(str(path)))


def _from_merges(folder: Path) -> PreTrainedTokenizerFast:
    with foreign.reading(folder, "a folder with vocab.json and merges.txt", FORMS):
        bpe = ByteLevelBPETokenizer.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer = Tokenizer.from_str(bpe.to_str())
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    bos, eos = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    if bos is not None and eos is not None:
        # RoBERTa's vocabulary has them, GPT-2's does not
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", eos), ("<s>", bos), add_prefix_space=False)
    return _wrap(tokenizer)


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def _usable(tokenizer: PreTrainedTokenizerFast, name: str) -> PreTrainedTokenizerFast:
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(
            f"the tokenizer at {name} is a slow one, without a tokenizer.json",
            "convert it with save_pretrained of its fast class",
        )
    backend = tokenizer.backend_tokenizer
    for role, tokens in _SPECIALS.items():
        if getattr(tokenizer, role) is None:
            found = next((token for token in tokens if backend.token_to_id(token) is not None), None)
            if found is not None:
                setattr(tokenizer, role, found)
    if tokenizer.eos_token is None:
        raise UsageError(
            f"the tokenizer at {name} has no end-of-text token", "name it as eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    backend.no_truncation()
    backend.no_padding()
    return tokenizer
