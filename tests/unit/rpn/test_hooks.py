"""Attaching noise to Hugging Face models, when it applies, and detaching it."""

import subprocess
import sys

import pytest
import torch
from noise_cases import HIDDEN, Spy, bert, embedded, llama, t5
from torch import nn
from transformers import LlamaForCausalLM

import rpn
from rpn import RPNConfig, Stream
from rpn.noise import move_scalars


def test_a_training_forward_has_exactly_the_noise_of_its_position(ids: torch.Tensor, mask: torch.Tensor) -> None:
    model = bert()
    handle = rpn.attach(model, RPNConfig(probability=0.3, seed=7))
    handle.place(step=4, micro_step=1, rank=1, world_size=2)
    with handle.noisy(2):
        noisy = embedded(model, ids, attention_mask=mask)
    stream = Stream(seed=7, step=4, micro_step=1, pass_index=2, rank=1, world_size=2)
    plain = model.get_input_embeddings().weight[ids].detach()
    assert torch.equal(noisy, move_scalars(plain, mask, stream, probability=0.3))
    assert torch.equal(noisy[~mask], plain[~mask])


@pytest.mark.parametrize("make", [bert, llama])
def test_no_noise_in_evaluation_without_gradients_or_in_a_clean_pass(make, ids: torch.Tensor) -> None:
    model = make()
    plain = model(ids).logits
    handle = rpn.attach(model, RPNConfig())
    assert not torch.equal(model(ids).logits, plain)
    with handle.clean():
        assert torch.equal(model(ids).logits, plain)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain)
    assert torch.equal(model.eval()(ids).logits, plain)


def test_no_noise_in_generation_even_in_training_mode(ids: torch.Tensor) -> None:
    model = llama()
    spy = Spy()
    rpn.attach(model, RPNConfig(), noise=spy)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert model.training
    assert not spy.calls


def hooks_and_attributes(model: nn.Module) -> dict[str, tuple]:
    """All attributes of all modules, including their hooks."""
    return {
        f"{name}.{key}": (type(value), len(value) if isinstance(value, dict) else None)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
    }


@pytest.mark.parametrize("make", [bert, llama, t5])
def test_detach_leaves_the_model_as_it_was(make, ids: torch.Tensor) -> None:
    model = make()
    inputs = {"input_ids": ids, "labels": ids} if make is t5 else {"input_ids": ids}
    plain, before = model(**inputs).logits, hooks_and_attributes(model)
    handle = rpn.attach(model, RPNConfig())
    noisy = model(**inputs).logits
    handle.detach()
    assert not torch.equal(noisy, plain)
    assert torch.equal(model(**inputs).logits, plain)
    assert hooks_and_attributes(model) == before
    handle.detach()
    rpn.attach(model, RPNConfig())


@pytest.mark.parametrize("make", [bert, t5])
def test_attaching_twice_is_an_error(make) -> None:
    model = make()
    handle = rpn.attach(model, RPNConfig())
    with pytest.raises(ValueError, match=r"already attached to this .*detach\(\)"):
        rpn.attach(model, RPNConfig())
    handle.detach()


def test_a_wrapped_model_is_an_error_that_names_the_remedy() -> None:
    with pytest.raises(ValueError, match="before DeepSpeed or DDP wraps it"):
        rpn.attach(nn.Sequential(bert()), RPNConfig())


@pytest.mark.parametrize("settings", [{"noise": "none"}, {"passes": 0}])
def test_without_noise_or_passes_no_forward_changes(settings: dict, ids: torch.Tensor) -> None:
    model = bert()
    plain = model(ids).logits
    handle = rpn.attach(model, RPNConfig(**settings))
    assert not handle.disturbs
    assert torch.equal(model(ids).logits, plain)


def test_by_default_each_forward_has_new_noise_and_within_a_pass_the_same(ids: torch.Tensor) -> None:
    model = bert()
    spy = Spy()
    handle = rpn.attach(model, RPNConfig(), noise=spy)
    model(ids)
    model(ids)
    assert [stream.pass_index for _, _, stream in spy.calls] == [0, 1]
    with handle.noisy(5):
        model(ids)
        model(ids)
    assert [stream.key for _, _, stream in spy.calls[2:]] == [Stream(pass_index=5).key] * 2
    model(ids)
    assert spy.stream.pass_index == 2


def test_modes_nest_and_end_with_an_exception(ids: torch.Tensor) -> None:
    model = bert()
    spy = Spy()
    handle = rpn.attach(model, RPNConfig(), noise=spy)

    def fail_in_a_clean_pass() -> None:
        with handle.clean():
            model(ids)
            raise KeyError

    with handle.noisy(3):
        with pytest.raises(KeyError):
            fail_in_a_clean_pass()
        assert not spy.calls
        model(ids)
    assert spy.stream.pass_index == 3
    model(ids)
    assert spy.stream.pass_index == 0


def test_a_failed_forward_leaves_no_state(ids: torch.Tensor) -> None:
    model = bert()
    spy = Spy()
    rpn.attach(model, RPNConfig(), noise=spy)
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model()
    model.get_input_embeddings()(ids)
    assert not spy.calls


def test_only_the_first_lookup_of_a_forward_gets_noise(ids: torch.Tensor) -> None:
    class EmbedsItsLabels(LlamaForCausalLM):
        def forward(self, input_ids, labels):
            return super().forward(input_ids).logits, self.get_input_embeddings()(labels)

    model = llama()
    model.__class__ = EmbedsItsLabels
    spy = Spy()
    rpn.attach(model, RPNConfig(), noise=spy)
    model(ids, ids[:, :3])
    assert [tuple(embeddings.shape) for embeddings, _, _ in spy.calls] == [(3, 8, HIDDEN)]


def test_a_custom_noise(ids: torch.Tensor, mask: torch.Tensor) -> None:
    model = bert()

    def flip(embeddings: torch.Tensor, keep: torch.Tensor, stream: Stream) -> torch.Tensor:
        return torch.where(keep[:, :, None], -embeddings, embeddings)

    rpn.attach(model, RPNConfig(), noise=flip)
    weight = model.get_input_embeddings().weight.detach()
    signs = 1 - 2 * mask[:, :, None].float()
    assert torch.equal(embedded(model, ids, attention_mask=mask), weight[ids] * signs)


@pytest.mark.parametrize("noise", ["rpn", "gaussian", "salt-and-pepper", "neftune", "symnoise"])
def test_every_noise_by_its_name(noise: str, ids: torch.Tensor, mask: torch.Tensor) -> None:
    model = bert()
    handle = rpn.attach(model, RPNConfig(noise=noise))
    weight = model.get_input_embeddings().weight.detach()
    changed = embedded(model, ids, attention_mask=mask) != weight[ids]
    share = changed[mask].float().mean()
    assert 0 < share < 0.3 if noise in ("rpn", "salt-and-pepper") else share > 0.9
    assert not changed[~mask].any()
    handle.detach()


def test_freelb_without_its_passes_is_an_error(ids: torch.Tensor) -> None:
    model = bert()
    rpn.attach(model, RPNConfig(noise="freelb"))
    with pytest.raises(RuntimeError, match=r"train with rpn\.run_passes"):
        model(ids)


def gradients(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(ids: torch.Tensor, reentrant: bool) -> None:
    model = llama()
    handle = rpn.attach(model, RPNConfig(probability=0.3))
    with handle.noisy(0):
        expected = gradients(model, ids)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        actual = gradients(model, ids)
    torch.testing.assert_close(actual, expected)


def test_gradients_with_a_trainable_and_a_frozen_embedding(ids: torch.Tensor) -> None:
    model = bert()
    rpn.attach(model, RPNConfig(probability=0.3))
    labels = torch.tensor([0, 1, 0])
    model(ids, labels=labels).loss.backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0
    model.zero_grad()
    model.get_input_embeddings().requires_grad_(False)
    model(ids, labels=labels).loss.backward()
    assert model.classifier.weight.grad.abs().sum() > 0


def test_bf16_models(ids: torch.Tensor, mask: torch.Tensor) -> None:
    model = bert().bfloat16()
    rpn.attach(model, RPNConfig(probability=0.3))
    model(ids, attention_mask=mask, labels=torch.tensor([0, 1, 0])).loss.backward()
    assert model.get_input_embeddings().weight.grad.isfinite().all()


def test_importing_the_settings_does_not_import_torch() -> None:
    check = (
        "import sys, rpn, rpn.config; rpn.RPNConfig(); assert 'torch' not in sys.modules\n"
        "import rpn.objective, rpn.noise; assert all(callable(getattr(rpn, name)) for name in rpn.__all__)"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
