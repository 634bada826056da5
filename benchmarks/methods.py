"""Ours and its peers on one model, each with the same number of trainable scalars, for the benchmarks.

frozen        the floor: forward, and backward through every layer to the input embeddings
sparse        ours; sparse-16: strips of 16 scalars; columns: within a tenth of the columns; whole: whole columns
lora dora shira supertuning    PEFT's, with its defaults; DoRA's ranks differ so that its magnitudes are counted too
lora-bf16     LoRA with autocast_adapter_dtype=False: adapters in the dtype of the model, which PEFT keeps in float32
peft-sparta   the reference implementation, with its defaults
full          every scalar
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from sparse_zero import SparseConfig, sparsify
from sparse_zero.selection.targets import find_targets

LEARNING_RATE = 1e-3

SHAPES = {
    # width, depth, heads, heads of keys and values, width of the MLP, vocabulary, tied
    "llama-20m": (256, 8, 4, 4, 704, 50304, True),
    "llama-60m": (512, 10, 8, 8, 1408, 50304, True),
    "llama-120m": (768, 12, 12, 12, 2048, 50304, True),
    "llama-350m": (1024, 24, 16, 16, 2816, 50304, True),
    "llama-1b": (2048, 16, 32, 8, 8192, 128_256, True),
    "llama-7b": (4096, 32, 32, 32, 11008, 32000, False),
}
"""20m to 350m have Llama's proportions, with every dimension divisible by 64; 1b is Llama 3.2, 7b Llama 2."""

TARGETS: dict[str, str | None] = {"value-output": None, "all-linear": "all-linear"}


def llama_config(name: str, layers: int | None = None) -> LlamaConfig:
    """Args: name: a key of SHAPES; layers: replaces its number of layers."""
    width, depth, heads, key_value_heads, mlp, vocabulary, tied = SHAPES[name]
    return LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        intermediate_size=mlp,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        use_cache=False,
    )


def llama(config: LlamaConfig, dtype: torch.dtype = torch.float32, device: str = "cpu") -> PreTrainedModel:
    """A frozen model with random weights, the same in each call."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).train().requires_grad_(False)


@dataclass(frozen=True)
class Budget:
    """The number of scalars that every method trains: that of the LoRA adapter whose rank is nearest to a density."""

    targets: str | None
    """The targets for SparseConfig."""
    shapes: Mapping[str, tuple[int, int]]
    """(rows, columns) of the target weights, by parameter name."""
    rank: int
    model_scalars: int

    @classmethod
    def of(cls, model: nn.Module, targets: str | None, density: float, of_model: bool = False) -> "Budget":
        """Args: density: fraction of the targets' scalars, or with `of_model` of the model's."""
        found = find_targets(model, SparseConfig(targets=targets), [])
        shapes = {name: tuple(target.shape) for name, target in found.items()}
        total = sum(parameter.numel() for parameter in model.parameters())
        wanted = density * (total if of_model else sum(math.prod(shape) for shape in shapes.values()))
        return cls(targets, shapes, max(1, round(wanted / sum(map(sum, shapes.values())))), total)

    @property
    def scalars(self) -> int:
        return self.rank * sum(map(sum, self.shapes.values()))

    @property
    def target_scalars(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def modules(self) -> list[str]:
        return [name.removesuffix(".weight") for name in self.shapes]


Prepare = Callable[[PreTrainedModel, Budget], nn.Module]


def frozen(model: PreTrainedModel, budget: Budget) -> nn.Module:
    return model


def sparse(model: PreTrainedModel, budget: Budget, **settings: Any) -> nn.Module:
    return sparsify(model, SparseConfig(rank_equivalent=budget.rank, targets=budget.targets, **settings))


def within_a_tenth(model: PreTrainedModel, budget: Budget) -> nn.Module:
    """Within a tenth of the columns, or more if the budget of a small model needs them."""
    needed = max(budget.rank * sum(shape) / math.prod(shape) for shape in budget.shapes.values())
    return sparse(model, budget, columns=min(1.0, max(0.1, needed)))


def lora(model: PreTrainedModel, budget: Budget) -> nn.Module:
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=budget.rank, target_modules=budget.modules))


def lora_in_the_models_dtype(model: PreTrainedModel, budget: Budget) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=budget.rank, target_modules=budget.modules)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def dora(model: PreTrainedModel, budget: Budget) -> nn.Module:
    import peft

    ranks = dora_ranks(budget)
    least = min(ranks.values())
    config = peft.LoraConfig(
        r=least,
        rank_pattern={name.removesuffix(".weight"): r for name, r in ranks.items() if r > least},
        target_modules=budget.modules,
        use_dora=True,
    )
    return peft.get_peft_model(model, config)


def dora_ranks(budget: Budget) -> dict[str, int]:
    """A rank for each target, so that low-rank matrices and magnitudes (one per row) together meet the budget."""
    left = budget.scalars - sum(rows for rows, _ in budget.shapes.values())
    least = max(1, left // sum(map(sum, budget.shapes.values())))
    ranks = dict.fromkeys(budget.shapes, least)
    left -= least * sum(map(sum, budget.shapes.values()))
    for name, shape in budget.shapes.items():
        if sum(shape) <= left:
            ranks[name] += 1
            left -= sum(shape)
    return ranks


def shira(model: PreTrainedModel, budget: Budget) -> nn.Module:
    import peft

    return peft.get_peft_model(model, peft.ShiraConfig(r=budget.rank, target_modules=budget.modules, random_seed=0))


def supertuning(model: PreTrainedModel, budget: Budget) -> nn.Module:
    import peft

    sparsity = 1 - budget.scalars / budget.target_scalars
    return peft.get_peft_model(model, peft.SupertuningConfig(sparsity=sparsity, target_modules=budget.modules))


def peft_sparta(model: PreTrainedModel, budget: Budget) -> nn.Module:
    from peft_sparta import SpaRTA

    others = [name for name, _ in model.named_parameters() if name not in budget.shapes]
    return SpaRTA(model, sparsity=1 - budget.scalars / budget.model_scalars, frozen_modules=others)


def full(model: PreTrainedModel, budget: Budget) -> nn.Module:
    return model.requires_grad_(True)


METHODS: dict[str, Prepare] = {
    "frozen": frozen,
    "sparse": sparse,
    "sparse-16": partial(sparse, granularity=16),
    "columns": within_a_tenth,
    "whole": partial(sparse, columns="whole"),
    "lora": lora,
    "lora-bf16": lora_in_the_models_dtype,
    "dora": dora,
    "shira": shira,
    "supertuning": supertuning,
    "peft-sparta": peft_sparta,
    "full": full,
}
OURS = ("sparse", "sparse-16", "columns", "whole")
PEERS = tuple(name for name in METHODS if name not in ("frozen", *OURS))
WRITES_WEIGHTS = (*OURS, "peft-sparta", "full")


def prepare(method: str, base: PreTrainedModel, budget: Budget) -> nn.Module:
    """The method applied to a copy of the model, which shares the weights that the method does not change."""
    shared = {} if method in WRITES_WEIGHTS else {id(parameter): parameter for parameter in base.parameters()}
    return METHODS[method](copy.deepcopy(base, shared), budget)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trained parameters, without the empty ones that peft-sparta has for every frozen weight."""
    return [p for p in model.parameters() if p.requires_grad and p.numel()]


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids).loss


def loss_of_frozen(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The loss of a model without trained parameters, with a graph through every layer."""
    embeddings = model.get_input_embeddings()(ids).requires_grad_(True)
    return model(inputs_embeds=embeddings, labels=ids).loss


def training_step(model: nn.Module, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A training step as a user would write it, with torch's fused AdamW, the default of transformers.Trainer.

    Returns: a function that trains once on this batch and returns the detached loss.
    """
    parameters = trained_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True) if parameters else None

    def step() -> torch.Tensor:
        loss = loss_of(model, ids) if optimizer else loss_of_frozen(model, ids)
        loss.backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    return step


def flops_of_step(config: LlamaConfig, tokens: int, weight_gradients: bool = False) -> int:
    """Model FLOPs of forward and backward over a sequence.

    Each scalar of a weight matrix, including the head's, costs 2 FLOPs per token in forward and 2 for the gradient of
    its input. The scores and values of attention cost 2 * 2 * width per pair of tokens in forward and twice that in
    backward (the causal mask is ignored). `weight_gradients`, for full fine-tuning, cost 2 more per scalar. The FLOPs
    for a method's own scalars are not counted.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    head = width // config.num_attention_heads
    attention = 2 * width * head * (config.num_attention_heads + config.num_key_value_heads)
    matrices = layers * (attention + 3 * width * config.intermediate_size) + width * config.vocab_size
    return (6 if weight_gradients else 4) * matrices * tokens + 12 * layers * width * tokens**2
