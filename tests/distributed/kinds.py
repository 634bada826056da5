"""A base with every kind of parameter, and the ways to select from it that the ranks and the reference share."""

from pathlib import Path
from typing import Any

import tiny
import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

KINDS: dict[str, dict[str, Any]] = {
    "embedding": {"targets": ["embed_tokens", "v_proj"], "density": 0.05},
    "norms-and-biases": {"targets": ["*norm", "*.bias"], "density": 0.01},
    "experts": {"targets": ["experts", "mlp.gate"], "density": 0.1},
    "experts-eager": {"targets": ["experts"], "density": 0.1},
    "experts-batched": {"targets": ["experts"], "density": 0.1},
    "strips": {"targets": "all-linear", "density": 0.1, "granularity": 8, "exclude_modules": ["shared_expert_gate"]},
    "columns": {"targets": "all-linear", "density": 0.05, "columns": 0.25, "exclude_modules": ["shared_expert_gate"]},
    "columns-whole": {"targets": ["experts", "self_attn.*", "lm_head"], "density": 0.1, "columns": "whole"},
    "columns-tied": {"targets": ["embed_tokens", "v_proj"], "density": 0.05, "columns": 0.5, "indices": "regenerated"},
    "bernoulli": {"targets": "all", "density": 0.05, "selection": "bernoulli"},
    "magnitude": {"targets": ["down_proj", "embed_tokens"], "density": 0.05, "selection": "magnitude"},
    "snip": {"targets": ["down_proj", "embed_tokens"], "density": 0.05, "selection": "snip"},
    "tokens": {"targets": ["v_proj"], "density": 0.02, "trainable_token_indices": [5, 9], "modules_to_save": ["norm"]},
    "dropout": {"targets": "all-linear", "density": 0.1, "dropout": 0.3},
}
EXPERTS = {"experts-eager": "eager", "experts-batched": "batched_mm"}
"""How the experts compute, where it is not transformers' default, grouped_mm."""

TRAINING = {
    "max_steps": 5,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
}


def batches_of(settings: dict[str, Any]) -> list[dict[str, torch.Tensor]] | None:
    """The batches whose gradients select, for a kind that needs them."""
    if settings.get("selection") != "snip":
        return None
    examples = tiny.examples("causal-lm", 3)
    return [{key: torch.tensor([example[key]]) for key in ("input_ids", "labels")} for example in examples]


def save_base(directory: Path, tied: bool) -> None:
    """A mixture of experts with biases; its input and output embeddings tied, or not."""
    torch.manual_seed(2)
    config = Qwen2MoeConfig(
        vocab_size=len(tiny.SPECIAL + tiny.WORDS),
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.2,
        router_aux_loss_coef=0.0,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    Qwen2MoeForCausalLM(config).save_pretrained(directory)
