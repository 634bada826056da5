"""The tiny models that stand in for those that the pages name."""

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="session")
def tiny_models(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Directories of random models with a tokenizer, by the hub ids that the pages use."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    torch.manual_seed(0)
    causal = LlamaConfig(
        **SIZES,
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    encoder = BertConfig(**SIZES, vocab_size=len(tokenizer), max_position_embeddings=256)
    models = {
        "HuggingFaceTB/SmolLM2-135M-Instruct": LlamaForCausalLM(causal),
        "sentence-transformers/all-MiniLM-L6-v2": BertModel(encoder),
    }
    directories = {}
    for name, model in models.items():
        directory = tmp_path_factory.mktemp("models") / name.rpartition("/")[2]
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        directories[name] = str(directory)
    return directories
