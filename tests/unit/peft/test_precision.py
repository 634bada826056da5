"""Half precision, autocast and gradient checkpointing: the deltas get the gradient of the dense model."""

import pytest
import torch
from peft_cases import TOKENS, assert_differs, fresh, in_peft, labels_of, logits, train
from torch import nn

from sparse_zero.model.sparsity import sparsity_of


def sparse_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.delta.grad for name, weight in sparsity_of(model).weights.items()}


def dense_gradients(base: nn.Module, model: nn.Module) -> dict[str, torch.Tensor]:
    """Those of a base model after backward, at the selected positions."""
    parameters = dict(base.named_parameters())
    return {
        name: parameters[name].grad.flatten()[weight.flat_positions()].float()
        for name, weight in sparsity_of(model).weights.items()
    }


def backward(model: nn.Module) -> None:
    model(input_ids=TOKENS, labels=labels_of(model)).loss.backward()


def assert_close(model: nn.Module, base: nn.Module, tolerance: float) -> None:
    found, expected = sparse_gradients(model), dense_gradients(base, model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        scale = expected[name].abs().max()
        assert scale > 0
        assert (gradient - expected[name]).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_gradient_checkpointing(bases, family, use_reentrant):
    """As in TRL and the Trainer, which switch it on after get_peft_model."""
    model, base = in_peft(bases[family]).train(), fresh(bases[family])
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert model.is_gradient_checkpointing
    backward(model)
    backward(base.train())
    assert_close(model, base, 1e-5)


def test_gradient_checkpointing_before_get_peft_model(bases):
    """PEFT lets the inputs require gradients itself, without which a reentrant checkpoint has none."""
    from peft import get_peft_model
    from peft_cases import CAUSAL

    from sparse_zero.peft import SparseZeroConfig

    plain, base = fresh(bases["llama"]).train(), fresh(bases["llama"]).train()
    plain.gradient_checkpointing_enable({"use_reentrant": True})
    model = get_peft_model(plain, SparseZeroConfig(**CAUSAL))
    backward(model)
    backward(base)
    assert_close(model, base, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_model_in_half_precision(tmp_path, bases, dtype):
    from peft import PeftModel, get_peft_model
    from peft_cases import CAUSAL

    from sparse_zero.peft import SparseZeroConfig

    base = fresh(bases["llama"], dtype=dtype)
    model = get_peft_model(fresh(bases["llama"], dtype=dtype), SparseZeroConfig(**CAUSAL))
    backward(model)
    backward(base)
    assert_close(model, base, 0.05)
    train(model)
    assert model.dtype == dtype
    assert_differs(model, logits(base))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh(bases["llama"], dtype=dtype), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(bases, dtype):
    model, base = in_peft(bases["llama"]), fresh(bases["llama"])
    with torch.autocast("cpu", dtype):
        backward(model)
        backward(base)
    assert_close(model, base, 0.05)
