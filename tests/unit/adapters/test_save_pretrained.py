"""model.save_pretrained, and what saves through it, write an adapter; buffers of fully trained modules are saved."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from families import tiny
from peft import LoraConfig, PeftModel, get_peft_model
from sparse_cases import batch_of, dense_copy, nudge, output_of
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from sparse_zero import (
    SparseConfig,
    SparseTrainer,
    UserError,
    disable_adapter,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    save_adapter,
    set_adapter,
    sparsify,
    unload,
)

CONFIG = SparseConfig(density=0.1)
BATCH = batch_of("llama")


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return output_of(model.eval(), BATCH)


def trainer(model: nn.Module, directory: Path) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in BATCH["input_ids"]]
    arguments = TrainingArguments(
        str(directory),
        max_steps=2,
        report_to=[],
        use_cpu=True,
        learning_rate=0.1,
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=2,
    )
    return Trainer(model, arguments, train_dataset=rows)


def opened(directory: Path) -> torch.Tensor:
    """The logits of a new base model with the adapter; a base model must not be there."""
    assert sorted(path.name for path in directory.glob("adapter*"))[0] == "adapter_config.json"
    assert not (directory / "model.safetensors").exists()
    return logits(load_adapter(tiny("llama"), directory))


def test_the_trainer_of_transformers(tmp_path):
    model = sparsify(tiny("llama"), CONFIG)
    run = trainer(model, tmp_path)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    expected = logits(dense_copy(tiny("llama"), model))
    assert torch.equal(logits(model), expected)
    assert not torch.equal(expected, logits(tiny("llama")))
    assert torch.equal(opened(tmp_path / "saved"), expected)
    assert torch.equal(opened(tmp_path / "checkpoint-2"), expected)


def test_the_card_of_an_adapter_survives_a_push(tmp_path):
    """Trainer.push_to_hub saves the adapter, then writes its card, and uploads the directory."""
    model = sparsify(tiny("llama"), CONFIG)
    run = SparseTrainer(model, TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True))
    run.save_model(_internal_call=True)
    card = (tmp_path / "README.md").read_text()
    run.create_model_card(model_name="user/name")
    assert "# Sparse adapter of" in card
    assert (tmp_path / "README.md").read_text() == card


def test_save_pretrained_in_each_state(tmp_path):
    model = sparsify(tiny("llama"), CONFIG)
    nudge(model)
    expected = logits(dense_copy(tiny("llama"), model))
    model.save_pretrained(tmp_path / "a", safe_serialization=True, max_shard_size="1GB")
    with disable_adapter(model):
        model.save_pretrained(str(tmp_path / "b"))
    assert torch.equal(opened(tmp_path / "a"), expected)
    assert torch.equal(opened(tmp_path / "b"), expected)
    with pytest.raises(UserError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "c", push_to_hub=True)
    with pytest.raises(UserError, match="save_adapter: privat: options of a push"):
        save_adapter(model, tmp_path / "c", privat=True)
    # A merged or plain model is written as ever
    merge_adapter(model)
    model.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)


@pytest.mark.parametrize("take_off", [unload, merge_and_unload])
def test_a_plain_model_is_written_afterwards(take_off, tmp_path):
    model = sparsify(tiny("llama"), CONFIG)
    nudge(model)
    plain = dense_copy(tiny("llama"), model) if take_off is merge_and_unload else tiny("llama")
    take_off(model).save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(plain))


def test_accelerate_saves_the_state_and_loads_it_into_another_model(tmp_path):
    accelerator = Accelerator(cpu=True)
    model = sparsify(tiny("llama"), CONFIG)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    for _ in range(2):
        accelerator.backward(model(**BATCH).loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(tmp_path, safe_serialization=False)
    expected = logits(dense_copy(tiny("llama"), accelerator.unwrap_model(model)))
    other = Accelerator(cpu=True)
    resumed = other.prepare(sparsify(tiny("llama", seed=8), CONFIG))
    second = other.prepare(torch.optim.AdamW([p for p in resumed.parameters() if p.requires_grad], lr=0.1))
    other.load_state(tmp_path)
    assert torch.equal(logits(resumed), expected)
    # It goes on as the first run would
    for net, steps in ((model, optimizer), (resumed, second)):
        net.train()
        net(**BATCH).loss.backward()
        steps.step()
    assert torch.equal(logits(resumed), logits(model))


# Buffers


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)).eval()


IMAGES = torch.randn(6, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 3 + 1
WHOLE = SparseConfig(density=0.3, targets=["2"], modules_to_save=["1"])


def shown(model: nn.Module) -> nn.Module:
    """After forwards in training mode, which change the running statistics."""
    model.train()
    with torch.no_grad():
        for images in IMAGES:
            model(images)
    return model.eval()


def seen(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IMAGES[0])


def test_running_statistics_are_saved_as_in_peft(tmp_path):
    model = shown(sparsify(convolutions(), WHOLE))
    save_adapter(model, tmp_path / "ours")
    loaded = load_adapter(convolutions(), tmp_path / "ours")
    peft = shown(get_peft_model(convolutions(), LoraConfig(target_modules=["2"], modules_to_save=["1"])))
    peft.save_pretrained(tmp_path / "peft")
    expected = seen(PeftModel.from_pretrained(convolutions(), tmp_path / "peft"))
    assert torch.equal(seen(loaded), expected)
    assert torch.equal(seen(model), expected)
    assert not torch.equal(seen(convolutions()), expected)
    count = loaded[1].num_batches_tracked
    assert (count.dtype, count.item()) == (torch.int64, 6)


def test_running_statistics_come_and_go_with_the_adapter(tmp_path):
    model = shown(sparsify(convolutions(), WHOLE))
    expected, base = seen(model), seen(convolutions())
    with disable_adapter(model):
        assert torch.equal(seen(model), base)
        save_adapter(model, tmp_path / "a")
    assert torch.equal(seen(model), expected)
    other = load_adapter(convolutions(), tmp_path / "a", "a")
    save_adapter(sparsify(convolutions(), WHOLE), tmp_path / "b")
    load_adapter(other, tmp_path / "b", "b")
    set_adapter(other, "b")
    assert torch.equal(seen(other), base)
    set_adapter(other, "a")
    assert torch.equal(seen(other), expected)
    assert torch.equal(seen(unload(other)), base)
    assert torch.equal(seen(merge_and_unload(model)), expected)
