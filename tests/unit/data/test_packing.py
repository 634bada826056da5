"""Packing several examples into one sequence."""

import random

import pytest
import torch
from data_cases import TEXT, language
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from sparse_zero.data.metrics import token_losses
from sparse_zero.data.packing import PackedCollator, check_packing, pack, pack_batch
from sparse_zero.data.tokenization import IGNORED
from sparse_zero.errors import UserError

# Packing


def test_pack_places_every_example_once_and_fills_well():
    draw = random.Random(0)
    lengths = [draw.randint(2, 100) for _ in range(3000)]
    sequences = pack(lengths, 128)
    assert sorted(example for sequence in sequences for example in sequence) == list(range(3000))
    filled = [sum(lengths[example] for example in sequence) for sequence in sequences]
    assert max(filled) <= 128
    assert sum(filled) / (128 * len(sequences)) > 0.97


def test_pack_is_best_fit_in_the_order_of_the_examples():
    assert pack([3, 6, 4, 7], 10) == [[0, 3], [1, 2]]
    assert pack([10, 10], 10) == [[0], [1]]


def test_packed_rows_restart_positions_and_mask_first_labels():
    batch = {"input_ids": [[1, 2, 3], [4, 5]], "labels": [[1, 2, 3], [IGNORED, 5]]}
    assert pack_batch(batch, 8) == {
        "input_ids": [[1, 2, 3, 4, 5]],
        "labels": [[IGNORED, 2, 3, IGNORED, 5]],
        "position_ids": [[0, 1, 2, 0, 1]],
    }


def tiny_model(kind: str, vocabulary: int, attention: str):
    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        config, build = GPT2Config(vocab_size=vocabulary, attn_implementation=attention, **sizes), GPT2LMHeadModel
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config, build = LlamaConfig(vocab_size=vocabulary, attn_implementation=attention, **sizes), LlamaForCausalLM
    config.use_cache = False  # as the Trainer sets it
    model = build(config).eval()
    # With the small default initialisation, attention would hardly change the logits
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_packed_examples_do_not_see_each_other(kind, attention, tokenizer, reviews_csv):
    texts = [
        "a good film",
        "bad",
        "a film about the sea and the people",
        "one of the worst",
        "yes",
        "it is what it is",
    ]
    alone = language(tokenizer, TEXT, {"text": texts}).train
    result = language(tokenizer, TEXT, {"text": texts}, packing=True, max_length=21)
    batch = result.collator([result.train[row] for row in range(2)])
    assert batch.keys() == {"input_ids", "labels", "position_ids"}
    assert batch["input_ids"].shape[0] == 2
    assert (batch["position_ids"] == 0).sum(-1).min() >= 2
    assert not batch["input_ids"].eq(tokenizer.pad_token_id).any(-1).all()
    assert batch["input_ids"].eq(tokenizer.pad_token_id).any()
    model = tiny_model(kind, len(tokenizer), attention)
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
        found = 0
        for row in alone:
            ids = torch.tensor(row["input_ids"])
            expected = model(input_ids=ids[None]).logits[0]
            for sequence, logits in zip(batch["input_ids"], packed, strict=True):
                for start in (sequence == tokenizer.bos_token_id).nonzero().flatten().tolist():
                    if torch.equal(sequence[start : start + len(ids)], ids):
                        found += 1
                        torch.testing.assert_close(logits[start : start + len(ids)], expected, atol=1e-5, rtol=1e-5)
    assert found == (batch["input_ids"] == tokenizer.bos_token_id).sum()


def test_packing_keeps_the_sum_of_the_losses(tokenizer):
    texts = {"text": [f"{letter * number} film" for number, letter in enumerate("abcdefg", start=1)]}
    model = tiny_model("llama", len(tokenizer), "sdpa")
    sums = []
    for settings in ({}, {"packing": True, "max_length": 32}):
        result = language(tokenizer, TEXT, texts, **settings)
        batch = result.collator([result.train[row] for row in range(len(result.train))])
        labels = batch.pop("labels")
        sums.append(token_losses(model(**batch).logits, labels).sum(0))
    assert len(result.train) < len(texts["text"])
    torch.testing.assert_close(sums[0], sums[1], atol=1e-3, rtol=1e-5)


def test_packed_collator_pads_with_examples_of_one_token():
    rows = [
        {"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7], "position_ids": [0, 1, 2]},
        {"input_ids": [8], "labels": [IGNORED], "position_ids": [0]},
    ]
    batch = PackedCollator(pad_token_id=3)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 3, 3]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, IGNORED, IGNORED]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]


def test_flash_attention_packs_only_batches_of_one():
    check_packing("sdpa", 8)
    check_packing("flash_attention_2", 1)
    with pytest.raises(UserError, match="flash_attention_2 separates packed examples only in batches of one"):
        check_packing("flash_attention_2", 2)
