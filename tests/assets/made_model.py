"""Models that have learned made stories, and their tokenizer, trained by plain Transformers: a LLaMA of 260,032
parameters, and a Mixtral of 76,192."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from made_text import stories
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

LENGTH, ROWS, STEPS, RATE = 128, 8, 120, 5e-3


def train_tokenizer(texts: list[str], vocab_size: int = 512) -> Tokenizer:
    """Return a byte-level BPE that puts <s> before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def write(folder: Path) -> None:
    """Write the model, its tokenizer and five stories that it has not seen. Takes about ten seconds."""
    folder.mkdir(parents=True)
    texts = stories(1500, "train")
    tokenizer = train_tokenizer(texts)
    assert tokenizer.get_vocab_size() == 512
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "sample.txt").write_text("\n\n".join(stories(5, "held out")) + "\n", encoding="utf-8")
    ids = torch.tensor([i for text in texts for i in tokenizer.encode(text).ids])
    blocks = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=172, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True, rms_norm_eps=1e-5,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    train(LlamaForCausalLM, config, blocks, ROWS, STEPS).save_pretrained(folder)


def write_mixture(folder: Path, learned: Path) -> None:
    """Write a mixture of experts that has learned other stories, with the tokenizer of one that is there."""
    tokenizer = Tokenizer.from_file(str(learned / "tokenizer.json"))
    ids = torch.tensor([i for text in stories(400, "train") for i in tokenizer.encode(text).ids])
    config = MixtralConfig(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, num_local_experts=4, num_experts_per_tok=2,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    train(MixtralForCausalLM, config, ids[: len(ids) // 64 * 64].reshape(-1, 64), 8, 80).save_pretrained(folder)
    for file in learned.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)


def train(kind, config, blocks: torch.Tensor, rows: int, steps: int):
    """Return a model after so many updates of so many blocks of tokens."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
        for _ in range(steps):
            batch = blocks[torch.randint(len(blocks), (rows,), generator=generator)]
            model(input_ids=batch, labels=batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model
