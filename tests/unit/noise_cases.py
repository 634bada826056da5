"""Small models to attach noise to, and a noise that records its calls."""

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from rpn import Stream

HIDDEN = 16
SHAPE = {"vocab_size": 60, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2}


def bert(model_class: type = BertForSequenceClassification) -> nn.Module:
    torch.manual_seed(0)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return model_class(BertConfig(**SHAPE, **no_dropout, intermediate_size=32, initializer_range=0.5)).train()


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, intermediate_size=32, initializer_range=0.5)).train()


def t5() -> nn.Module:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=60, d_model=HIDDEN, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, initializer_factor=5.0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).train()


class Spy:
    """A custom noise that changes nothing and records its calls."""

    def __init__(self):
        self.calls: list[tuple[torch.Tensor, torch.Tensor, Stream]] = []

    def __call__(self, embeddings: torch.Tensor, keep: torch.Tensor, stream: Stream) -> torch.Tensor:
        self.calls.append((embeddings, keep, stream))
        return embeddings

    @property
    def keep(self) -> torch.Tensor:
        return self.calls[-1][1]

    @property
    def stream(self) -> Stream:
        return self.calls[-1][2]


def embedded(model: nn.Module, *args, **kwargs) -> torch.Tensor:
    """The output of the embeddings that the model's first layer receives, after all hooks."""
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(output))
    model(*args, **kwargs)
    hook.remove()
    return seen[0].detach()
