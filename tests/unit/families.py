"""Tiny random models of many families."""

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

LAYERS = 2
VOCABULARY = 96
TASKS = {
    "causal-lm": AutoModelForCausalLM,
    "sequence-classification": AutoModelForSequenceClassification,
    "seq2seq-lm": AutoModelForSeq2SeqLM,
}
DECODERS = [
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi", "phi3"),
    *("gpt_neox", "gpt2", "opt", "falcon", "bloom"),
]
ENCODERS = ["bert", "roberta", "distilbert", "electra", "deberta-v2"]
ENCODER_DECODERS = ["t5"]

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OWN_SIZES = {
    **{family: {"head_dim": 8} for family in ("qwen3", "gemma", "gemma2")},
    "qwen2_moe": {
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 12,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
    },
    "bert": {"is_decoder": False},
    "distilbert": {"hidden_dim": 24},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "electra": {"embedding_size": 16},
    "t5": {"d_kv": 8, "d_ff": 24, "num_decoder_layers": LAYERS, "decoder_start_token_id": 0},
}
NO_DROPOUT = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


def tiny(family: str, task: str = "causal-lm", seed: int = 0, **settings: object) -> PreTrainedModel:
    """A random model of two layers in training mode. Families that tests train have no dropout."""
    settings = SIZES | OWN_SIZES.get(family, {}) | NO_DROPOUT.get(family, {}) | settings
    torch.manual_seed(seed)
    return TASKS[task].from_config(AutoConfig.for_model(family, **settings)).train()
