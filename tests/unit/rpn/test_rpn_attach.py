"""Noise attached to Hugging Face models: when it acts, on what, and that detaching leaves nothing behind."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import rpn
from rpn import RPNConfig, Stream
from rpn.noise import move_scalars

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


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(5, 60, (3, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def mask() -> torch.Tensor:
    return torch.arange(8).expand(3, -1) < torch.tensor([8, 5, 2])[:, None]


class Spy:
    """A user's noise that changes nothing and remembers what it was called with."""

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
    """What the model's body received from its embeddings: recorded behind every hook there is."""
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(output))
    model(*args, **kwargs)
    hook.remove()
    return seen[0].detach()


def test_training_forward_meets_exactly_the_noise_of_its_place(ids: torch.Tensor, mask: torch.Tensor) -> None:
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
def test_silent_in_evaluation_without_gradients_and_when_clean(make, ids: torch.Tensor) -> None:
    model = make()
    plain = model(ids).logits
    handle = rpn.attach(model, RPNConfig())
    assert not torch.equal(model(ids).logits, plain)
    with handle.clean():
        assert torch.equal(model(ids).logits, plain)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain)
    assert torch.equal(model.eval()(ids).logits, plain)


def test_silent_in_generation_even_in_training_mode(ids: torch.Tensor) -> None:
    model = llama()
    spy = Spy()
    rpn.attach(model, RPNConfig(), noise=spy)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert model.training
    assert not spy.calls


def hooks_and_attributes(model: nn.Module) -> dict[str, tuple]:
    """Every attribute of every module, and the hooks that it holds."""
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
def test_no_noise_or_no_passes_leaves_every_forward_alone(settings: dict, ids: torch.Tensor) -> None:
    model = bert()
    plain = model(ids).logits
    handle = rpn.attach(model, RPNConfig(**settings))
    assert not handle.disturbs
    assert torch.equal(model(ids).logits, plain)


def test_left_alone_it_draws_each_forward_anew_and_repeats_within_a_pass(ids: torch.Tensor) -> None:
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


def test_a_failed_forward_leaves_nothing_pending(ids: torch.Tensor) -> None:
    model = bert()
    spy = Spy()
    rpn.attach(model, RPNConfig(), noise=spy)
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model()
    model.get_input_embeddings()(ids)
    assert not spy.calls


def test_only_the_first_look_up_of_a_forward_is_its_input(ids: torch.Tensor) -> None:
    class EmbedsItsLabels(LlamaForCausalLM):
        def forward(self, input_ids, labels):
            return super().forward(input_ids).logits, self.get_input_embeddings()(labels)

    model = llama()
    model.__class__ = EmbedsItsLabels
    spy = Spy()
    rpn.attach(model, RPNConfig(), noise=spy)
    model(ids, ids[:, :3])
    assert [tuple(embeddings.shape) for embeddings, _, _ in spy.calls] == [(3, 8, HIDDEN)]


@pytest.mark.parametrize("positional", [False, True])
def test_inputs_embeds_meet_the_same_noise(ids: torch.Tensor, mask: torch.Tensor, positional: bool) -> None:
    model = bert()
    handle = rpn.attach(model, RPNConfig())
    embeddings = model.get_input_embeddings()(ids)
    before = embeddings.clone()
    with handle.noisy(0):
        expected = model(ids, attention_mask=mask).logits
        if positional:
            actual = model(None, mask, None, None, embeddings).logits
        else:
            actual = model(inputs_embeds=embeddings, attention_mask=mask).logits
    assert torch.equal(actual, expected)
    assert torch.equal(embeddings, before)


def test_masks_are_found_among_positional_arguments(ids: torch.Tensor, mask: torch.Tensor) -> None:
    model = bert()
    spy = Spy()
    rpn.attach(model, RPNConfig(), noise=spy)
    model(ids, mask)
    assert torch.equal(spy.keep, mask)
    model(ids, mask.long())
    assert torch.equal(spy.keep, mask)
    model(ids)
    assert spy.keep.all()


def test_positional_arguments_without_names_are_an_error(ids: torch.Tensor) -> None:
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = bert()

        def get_input_embeddings(self) -> nn.Module:
            return self.inner.get_input_embeddings()

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    wrapper = Wrapper()
    spy = Spy()
    rpn.attach(wrapper, RPNConfig(), noise=spy)
    wrapper(input_ids=ids)
    assert len(spy.calls) == 1
    with pytest.raises(ValueError, match="pass them by keyword"):
        wrapper(ids)


def test_a_mask_longer_than_the_tokens_begins_with_what_precedes_them(ids: torch.Tensor, mask: torch.Tensor) -> None:
    model = llama()
    spy = Spy()
    rpn.attach(model, RPNConfig(), noise=spy)
    past = model(ids[:, :2]).past_key_values
    model(ids[:, 2:], attention_mask=mask, past_key_values=past)
    assert torch.equal(spy.keep, mask[:, 2:])


def test_a_mask_that_does_not_fit_is_an_error(ids: torch.Tensor) -> None:
    model = bert()
    rpn.attach(model, RPNConfig())
    with pytest.raises(ValueError, match=r"attention mask, \(3, 5\), does not fit embeddings of 3 x 8 tokens"):
        model(ids, attention_mask=torch.ones(3, 5))


def test_a_4d_mask_is_passed_over_with_a_warning(ids: torch.Tensor) -> None:
    model = llama()
    spy = Spy()
    rpn.attach(model, RPNConfig(), noise=spy)
    causal = torch.ones(8, 8, dtype=torch.bool).tril().expand(3, 1, -1, -1)
    with pytest.warns(UserWarning, match="does not say which tokens are padding"):
        model(ids, attention_mask=causal)
    assert spy.keep.all()


def test_packed_rows_are_cut_where_positions_start_anew(ids: torch.Tensor, mask: torch.Tensor) -> None:
    model = llama()
    spy = Spy()
    handle = rpn.attach(model, RPNConfig(scope="sequence"), noise=spy)
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7], [3, 4, 0, 1, 2, 3, 4, 0]])
    model(ids, position_ids=position_ids)
    expected = [[0, 0, 0, 1, 1, 2, 2, 2], [0] * 8, [0, 0, 0, 0, 0, 0, 0, 1]]
    assert spy.stream.pieces.tolist() == expected
    # with an attention mask transformers does not read them as packed either
    model(ids, position_ids=position_ids, attention_mask=mask)
    assert spy.stream.pieces is None
    handle.detach()

    rpn.attach(model, RPNConfig(scope="sequence", probability=1.0))
    weight = model.get_input_embeddings().weight.detach()
    noisy, plain = embedded(model, ids[:1], position_ids=position_ids[:1])[0], weight[ids[0]]
    assert not torch.equal(noisy, plain)
    for piece in (slice(0, 3), slice(3, 5), slice(5, 8)):
        assert torch.equal(noisy[piece].flatten().sort()[0], plain[piece].flatten().sort()[0])


def test_encoder_decoder_disturbs_the_encoder_alone(ids: torch.Tensor, mask: torch.Tensor) -> None:
    model = t5()
    spy = Spy()
    handle = rpn.attach(model, RPNConfig(), noise=spy)
    labels = ids[:, :4].contiguous()
    model(input_ids=ids, attention_mask=mask, labels=labels)
    assert len(spy.calls) == 1
    assert torch.equal(spy.keep, mask)
    torch.testing.assert_close(spy.calls[0][0], model.shared(ids))
    encoded = model.encoder(input_ids=ids)
    spy.calls.clear()
    model(encoder_outputs=encoded, attention_mask=mask, labels=labels)
    assert not spy.calls
    model(inputs_embeds=model.shared(ids), attention_mask=mask, labels=labels)
    assert len(spy.calls) == 1
    handle.detach()
    # sharing one embedding module between encoder and decoder, as earlier models do, changes nothing
    model.encoder.embed_tokens = model.decoder.embed_tokens = model.shared
    rpn.attach(model, RPNConfig(), noise=spy)
    model(input_ids=ids, attention_mask=mask, labels=labels)
    assert len(spy.calls) == 2
    assert torch.equal(spy.calls[1][0], model.shared(ids))


def test_multiple_choice_flattens_its_mask_as_its_tokens() -> None:
    model = bert(BertForMultipleChoice)
    spy = Spy()
    rpn.attach(model, RPNConfig(), noise=spy)
    ids = torch.randint(5, 60, (2, 3, 6))
    mask = torch.arange(6) < torch.tensor([[6, 5, 4], [3, 2, 1]])[:, :, None]
    model(input_ids=ids, attention_mask=mask)
    assert torch.equal(spy.keep, mask.view(6, 6))


def test_special_tokens_stay_as_they_are(ids: torch.Tensor, mask: torch.Tensor) -> None:
    model = bert()
    ids[:, 0] = 1
    ids[0, 7] = 2
    handle = rpn.attach(model, RPNConfig(exclude_special_tokens=True, probability=1.0), special_token_ids=iter([2, 1]))
    weight = model.get_input_embeddings().weight.detach()
    noisy, plain = embedded(model, ids, attention_mask=mask), weight[ids]
    special = (ids == 1) | (ids == 2)
    assert torch.equal(noisy[special | ~mask], plain[special | ~mask])
    assert not torch.equal(noisy, plain)
    with pytest.raises(ValueError, match="without input_ids"):
        model(inputs_embeds=weight[ids])
    handle.detach()
    # off by default, whatever ids are given
    rpn.attach(model, RPNConfig(probability=1.0), special_token_ids=[1, 2])
    assert not torch.equal(embedded(model, ids, attention_mask=mask)[:, 0], plain[:, 0])


def test_special_tokens_must_be_named() -> None:
    with pytest.raises(ValueError, match=r"special_token_ids=tokenizer\.all_special_ids"):
        rpn.attach(bert(), RPNConfig(exclude_special_tokens=True))


def test_a_noise_of_ones_own(ids: torch.Tensor, mask: torch.Tensor) -> None:
    model = bert()

    def flip(embeddings: torch.Tensor, keep: torch.Tensor, stream: Stream) -> torch.Tensor:
        return torch.where(keep[:, :, None], -embeddings, embeddings)

    rpn.attach(model, RPNConfig(), noise=flip)
    weight = model.get_input_embeddings().weight.detach()
    signs = 1 - 2 * mask[:, :, None].float()
    assert torch.equal(embedded(model, ids, attention_mask=mask), weight[ids] * signs)


@pytest.mark.parametrize("noise", ["rpn", "gaussian", "salt-and-pepper", "neftune"])
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


def test_gradient_reaches_a_trainable_embedding_and_a_frozen_one_is_no_obstacle(ids: torch.Tensor) -> None:
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


def test_importing_the_settings_does_not_load_torch() -> None:
    check = (
        "import sys, rpn, rpn.config; rpn.RPNConfig(); assert 'torch' not in sys.modules\n"
        "import rpn.objective, rpn.noise; assert all(callable(getattr(rpn, name)) for name in rpn.__all__)"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
