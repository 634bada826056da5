"""Calls of other libraries on a sparse model with a quantised base: PEFT's, transformers' Trainer and `generate`."""

import copy

import pytest
import torch
from quantized_cases import batch, dense_like, load
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from sparse_zero import SparseConfig, UserError, load_adapter, merge_and_unload, sparsify, unload

SETTINGS = {"targets": "all-linear", "density": 0.03, "columns": "whole"}


def test_peft(base, tmp_path):
    peft = pytest.importorskip("peft")
    from sparse_zero.peft import SparseZeroConfig

    data, model = batch(), load(base, "nf4")
    frozen = model(**data).logits
    adapted = peft.get_peft_model(model, SparseZeroConfig(**SETTINGS, task_type="CAUSAL_LM"))
    assert torch.equal(adapted(**data).logits, frozen)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    first = adapted(**data).loss
    first.backward()
    optimizer.step()
    trained = adapted(**data)
    assert trained.loss < first - 0.01
    with adapted.disable_adapter():
        assert torch.equal(adapted(**data).logits, frozen)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(base, "nf4"), tmp_path).train()
    assert torch.equal(again(**data).logits, trained.logits)
    with pytest.raises(UserError, match="is quantised, and nothing is written into it"):
        adapted.merge_adapter()
    merged = adapted.merge_and_unload()
    assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear
    torch.testing.assert_close(merged(**data).logits, trained.logits, rtol=1e-4, atol=1e-4)


def test_the_trainer_of_transformers(base, tmp_path):
    """It refuses a quantised model without adapters, and takes a sparse one."""
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        use_cpu=True,
        max_steps=2,
        learning_rate=1e-2,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    rows = [{name: values[0] for name, values in batch().items()}] * 8
    with pytest.raises(ValueError, match="purely quantized models"):
        Trainer(load(base, "nf4"), arguments, train_dataset=rows)
    model = sparsify(load(base, "nf4"), SparseConfig(**SETTINGS))
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    logits = model.train()(**batch()).logits
    assert torch.equal(load_adapter(load(base, "nf4"), tmp_path / "adapter")(**batch()).logits, logits)


def test_the_hooks_of_accelerate(base):
    """Where a model is on several devices, each layer's forward is that of a hook, which calls the one before."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    losses, deltas = [], []
    for hooked in (False, True):
        model = load(base, "nf4")
        layers = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
        for layer in layers if hooked else ():
            add_hook_to_module(layer, ModelHook())
        frozen = model(**batch()).logits
        sparsify(model, SparseConfig(**SETTINGS))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(2):
            optimizer.zero_grad()
            loss = model(**batch()).loss
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
        deltas.append([weight.delta.detach().clone() for weight in model.sparsity.weights.values()])
        trained = model(**batch()).logits
        merged = copy.deepcopy(model)
        assert torch.equal(unload(model)(**batch()).logits, frozen)
        merge_and_unload(merged)
        torch.testing.assert_close(merged(**batch()).logits, trained, rtol=1e-4, atol=1e-4)
        assert hasattr(merged.model.layers[0].mlp.up_proj, "_hf_hook") == hooked
    assert losses[0] == losses[1]
    assert all(torch.equal(one, other) and one.abs().max() > 0 for one, other in zip(*deltas, strict=True))
    model = load(base, "nf4")
    model.model.layers[0].mlp.up_proj.forward = lambda x: x
    with pytest.raises(UserError, match="forward of a quantised Linear4bit was replaced"):
        sparsify(model, SparseConfig(**SETTINGS))


@pytest.mark.parametrize("kind", ["nf4", "int8_weight_only"])
@pytest.mark.parametrize("columns", ["whole", 1])
def test_answers_are_those_of_the_dense_model(base, columns, kind):
    """Not in bitsandbytes' 8 bits: it rounds the inputs in an evaluation."""
    model = load(base, kind)
    dense = dense_like(base, model)
    for each in (model, dense):
        sparsify(each, SparseConfig(**SETTINGS | {"columns": columns}))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in each.sparsity.weights.values():
                weight.delta.copy_(torch.randn(weight.delta.shape, generator=generator) * 0.2)
    prompt = {"input_ids": batch()["input_ids"], "max_new_tokens": 8, "do_sample": False}
    answers = [each.eval().generate(**prompt) for each in (model, dense)]
    assert torch.equal(*answers)


@pytest.mark.parametrize("columns", ["whole", 1])
def test_8_bits_in_an_evaluation_start_where_the_base_is(base, columns):
    """bitsandbytes rounds the inputs then: the deltas have a product of their own, and disabling gives the base."""
    data, model = batch(), load(base, "int8").eval()
    frozen = model(**data).logits
    sparsify(model, SparseConfig(**SETTINGS | {"columns": columns}))
    assert torch.equal(model(**data).logits, frozen)
    dense = dense_like(base, model)
    with torch.no_grad():
        for name, weight in model.sparsity.weights.items():
            weight.delta.normal_(std=0.2)
            dense.get_parameter(name).view(-1)[weight.flat_positions()] += weight.delta
    changed = model(**data)
    torch.testing.assert_close(changed.logits, dense(**data).logits, rtol=0.1, atol=0.15)
    assert (changed.logits - frozen).abs().max() > 0.8
    changed.loss.backward()
    assert all(weight.delta.grad.abs().max() > 0 for weight in model.sparsity.weights.values())


def test_ddp_leaves_out_the_weights_of_torchao(base):
    """Which it cannot send to other ranks, also if the model is in one of PEFT."""
    peft = pytest.importorskip("peft")
    from sparse_zero.peft import SparseZeroConfig

    kind, data = "int8_weight_only", batch()
    models = [
        sparsify(load(base, kind), SparseConfig(**SETTINGS)),
        peft.get_peft_model(load(base, kind), SparseZeroConfig(**SETTINGS, task_type="CAUSAL_LM")),
    ]
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(NotImplementedError, match="Int8Tensor"):
            DistributedDataParallel(load(base, kind))
        losses = []
        for model in models:
            loss = DistributedDataParallel(model)(**data).loss
            loss.backward()
            losses.append(loss.item())
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            assert trained
            assert all(parameter.grad.abs().max() > 0 for parameter in trained)
    finally:
        torch.distributed.destroy_process_group()
    assert losses == [load(base, kind)(**data).loss.item()] * 2
