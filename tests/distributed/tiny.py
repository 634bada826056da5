"""The tiny random models and examples that the ranks and the tests' references share."""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
WORDS = [f"{color}{thing}" for color in ("red", "blue", "green", "gray") for thing in range(15)]
TOKENS = 16
"""Length of every example, padding included."""

PER_BLOCK = 67
"""Selected scalars of the smallest target; an odd number, so that no partition comes out even."""

AUTO_CLASS = {"causal-lm": AutoModelForCausalLM, "sequence-classification": AutoModelForSequenceClassification}


def selected_counts(task: str) -> dict[str, int]:
    """What `density_of` makes the selection draw: in proportion to the sizes of the two layers' targets."""
    if task == "causal-lm":  # grouped queries: v_proj is half as large as o_proj
        names = {"model.layers.{}.self_attn.v_proj.weight": 1, "model.layers.{}.self_attn.o_proj.weight": 2}
    else:
        names = {"bert.encoder.layer.{}.attention.self.value.weight": 1}
        names["bert.encoder.layer.{}.attention.output.dense.weight"] = 1
    return {name.format(layer): PER_BLOCK * size for layer in range(2) for name, size in names.items()}


def head_of(task: str) -> list[str]:
    """The parameters trained in full."""
    return ["classifier.weight", "classifier.bias"] if task == "sequence-classification" else []


def trainable_count(model: PreTrainedModel, task: str) -> int:
    parameters = dict(model.named_parameters())
    return sum(selected_counts(task).values()) + sum(_numel(parameters[name]) for name in head_of(task))


def density_of(model: PreTrainedModel, task: str) -> float:
    """The density at which exactly `selected_counts` are drawn."""
    return trainable_count(model, task) / sum(_numel(p) for p in model.parameters())


def _numel(parameter: torch.nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # under ZeRO stage 3 numel() is 0


def save_tokenizer(directory: Path) -> None:
    """One token per word; a text starts with <bos>."""
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(directory)


def save_llama(directory: Path, vocabulary: int = len(SPECIAL + WORDS)) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.2,  # large enough for ten steps to matter
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    save_tokenizer(directory)


def save_bert(directory: Path) -> None:
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
    )
    BertForSequenceClassification(config).save_pretrained(directory)
    save_tokenizer(directory)


def examples(task: str, count: int) -> list[dict]:
    """`count` examples of TOKENS tokens, of which 24 are distinct, so that a few steps learn something.

    A language model's loss counts 1 to 12 tokens of each; a classifier's input is padded.
    """
    rng = random.Random(task)
    made = []
    for _ in range(24):
        words = rng.choices(range(len(SPECIAL), len(SPECIAL + WORDS)), k=TOKENS - 1)
        ids = [1, *words]
        if task == "causal-lm":
            prompt = rng.choice([4, 6, 14, 15])
            made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
        else:
            length = rng.randint(4, TOKENS)
            padding = TOKENS - length
            label = int(sum(words[: length - 1]) % 3 == 0)
            mask = [1] * length + [0] * padding
            made.append({"input_ids": ids[:length] + [0] * padding, "attention_mask": mask, "labels": label})
    return [made[index % len(made)] for index in range(count)]
