"""A LLaMA of 260,032 parameters that has learned made stories, and its tokenizer: trained by plain Transformers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from made_text import stories
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

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
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
        for _ in range(STEPS):
            batch = blocks[torch.randint(len(blocks), (ROWS,), generator=generator)]
            model(input_ids=batch, labels=batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)
