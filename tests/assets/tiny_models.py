"""Tiny models of the causal families of Transformers, from configurations."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

V = 61
SMALL = {"vocab_size": V, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
GATED = SMALL | {"intermediate_size": 24, "num_key_value_heads": 2}
MOE = GATED | {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2, "num_local_experts": 4}
LATENT = MOE | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1}
LATENT |= {"topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4}
LATENT |= {"v_head_dim": 4}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT = {"vocab_size": V, "n_embd": 16, "n_head": 2, "n_layer": 2}
PLAIN = ("apertus", "arcee", "bitnet", "ernie4_5", "exaone4", "gpt_neox", "lfm2", "llama", "mistral", "nanochat")
PLAIN += ("olmo", "olmo2", "olmo3", "persimmon", "phi", "qwen2", "stablelm", "starcoder2")
WIDE = ("gemma3_text", "helium", "hunyuan_v1_dense", "ministral", "nemotron", "qwen3", "seed_oss", "vaultgemma")
CONFIGS = dict.fromkeys(PLAIN, GATED) | dict.fromkeys(WIDE, GATED | {"head_dim": 8} | TOKENS)
CONFIGS |= dict.fromkeys(("granitemoe", "jamba", "mixtral", "olmoe", "phimoe"), MOE)
CONFIGS |= {
    "bamba": GATED | {"mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 4},
    "bert": GATED | {"is_decoder": True},
    "biogpt": SMALL | {"intermediate_size": 24, "max_position_embeddings": 16},
    "bloom": SMALL | {"n_layer": 2, "n_head": 2},
    "codegen": GPT | {"n_head": 4, "rotary_dim": 4, "n_inner": 24},
    "cohere": GATED | TOKENS | {"logit_scale": 0.3},
    "cohere2": GATED | TOKENS | {"logit_scale": 0.3, "head_dim": 8},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "electra": GATED | {"is_decoder": True, "embedding_size": 8},
    "falcon": SMALL,
    "falcon_h1": GATED
    | {"head_dim": 8, "mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 4}
    | {"mamba_n_groups": 1, "lm_head_multiplier": 0.4},
    "gemma": GATED | {"head_dim": 8, "num_key_value_heads": 1},
    "gemma2": GATED | {"head_dim": 8, "final_logit_softcapping": 2.0},
    "glm": GATED | {"head_dim": 8} | TOKENS,
    "glm4": GATED | {"head_dim": 8} | TOKENS,
    "gpt2": GPT,
    "gpt_bigcode": GPT | {"n_positions": 16},
    "gpt_neo": {"vocab_size": V, "hidden_size": 16, "num_heads": 2, "num_layers": 2}
    | {"attention_types": [[["global", "local"], 1]], "intermediate_size": 24},
    "gpt_oss": MOE | {"head_dim": 8},
    "gptj": GPT | {"rotary_dim": 4, "n_inner": 24},
    "granite": GATED | {"logits_scaling": 3.0},
    "llama4_text": MOE | {"head_dim": 8, "intermediate_size_mlp": 24, "pad_token_id": 0},
    "mamba": SMALL | {"state_size": 4},
    "mamba2": {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2}
    | {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1},
    "minicpm3": LATENT | {"dim_model_base": 8},
    "modernbert-decoder": GATED | TOKENS | {"cls_token_id": 1, "sep_token_id": 2},
    "mpt": {"vocab_size": V, "d_model": 16, "n_heads": 2, "n_layers": 2, "expansion_ratio": 2},
    "opt": SMALL | {"ffn_dim": 24, "word_embed_proj_dim": 8},
    "phi3": GATED | {"pad_token_id": 0},
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 8},
    "qwen3_moe": MOE | {"head_dim": 8},
    "qwen3_next": MOE
    | {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    | {"shared_expert_intermediate_size": 8, "head_dim": 8},
    "recurrent_gemma": GATED | {"lru_width": 16, "attention_window_size": 8, "pad_token_id": 0},
    "rwkv": SMALL | {"attention_hidden_size": 16, "intermediate_size": 24},
    "smollm3": GATED | {"pad_token_id": 0},
}
DROPOUTS = ("dropout", "attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "embedding_dropout")
DROPOUTS += ("hidden_dropout_prob", "attention_probs_dropout_prob", "residual_dropout", "activation_dropout")
DROPOUTS += ("hidden_dropout", "router_jitter_noise", "input_jitter_noise")


def tiny_config(model_type, **changes):
    """Return a configuration without dropout."""
    config = AutoConfig.for_model(model_type, **(CONFIGS[model_type] | changes))
    config.get_text_config().vocab_size = V
    for name in DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return config


def tiny(model_type, **changes):
    """Return a model in float64."""
    # the grouped product of experts is for 16 and 32 bits
    options = {"dtype": torch.float64, "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes), **options).train()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model
