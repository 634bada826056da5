"""A tiny Llama in a GGUF file, as llama.cpp's converter writes it."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from families import tiny
from transformers import AutoTokenizer, PreTrainedModel

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
    "model.layers": "blk",
}


def write_gguf(path: Path, tokenizer_dir: Path, seed: int = 0) -> PreTrainedModel:
    """Write a tiny Llama with the tokenizer; its projections of 32 columns in Q8_0.

    Returns: the model with the values that the file has, by the definition of Q8_0: round(w / d) d, where d is the
    float16 of max |w| / 127 over 32 weights.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    model = tiny("llama", seed=seed, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, head_dim=16)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("a tiny model")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(len(tokenizer))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    special = {*tokenizer.all_special_ids}
    kinds = (gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(len(tokenizer)))
    writer.add_token_types([kind.value for kind in kinds])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = parameter.float()
            if "_proj" in name:
                blocks = values.reshape(-1, 32)
                scale = (blocks.abs().amax(1, keepdim=True) / 127).half().float()
                parameter.copy_((torch.round(blocks / scale) * scale).view_as(parameter))
                values = parameter
            kind = gguf.GGMLQuantizationType.Q8_0 if "_proj" in name else gguf.GGMLQuantizationType.F32
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
                name.split(".")[-2]
            )
            array = _paired(values, heads).numpy() if heads else values.numpy()
            writer.add_tensor(_renamed(name), _bytes(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model.eval()


def _renamed(name: str) -> str:
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def _paired(values: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows in llama.cpp's order: the two halves of a head's rotation, which transformers keeps apart, in turns."""
    rows, columns = values.shape
    return values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns).contiguous()


def _bytes(array: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    return gguf.quants.quantize(array, kind) if kind != gguf.GGMLQuantizationType.F32 else array
