"""Which tokens get noise: masks, packed rows, embeddings as inputs, encoder-decoder models and special tokens."""

import pytest
import torch
from noise_cases import Spy, bert, embedded, llama, t5
from torch import nn
from transformers import BertForMultipleChoice

import rpn
from rpn import RPNConfig


@pytest.mark.parametrize("positional", [False, True])
def test_inputs_embeds_get_the_same_noise(ids: torch.Tensor, mask: torch.Tensor, positional: bool) -> None:
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


def test_a_longer_mask_starts_with_the_tokens_before(ids: torch.Tensor, mask: torch.Tensor) -> None:
    model = llama()
    spy = Spy()
    rpn.attach(model, RPNConfig(), noise=spy)
    past = model(ids[:, :2]).past_key_values
    model(ids[:, 2:], attention_mask=mask, past_key_values=past)
    assert torch.equal(spy.keep, mask[:, 2:])


def test_a_mask_that_does_not_fit_is_an_error(ids: torch.Tensor) -> None:
    model = bert()
    rpn.attach(model, RPNConfig())
    with pytest.raises(ValueError, match=r"attention mask of shape \(3, 5\) does not fit embeddings of 3 x 8 tokens"):
        model(ids, attention_mask=torch.ones(3, 5))


def test_a_4d_mask_is_ignored_with_a_warning(ids: torch.Tensor) -> None:
    model = llama()
    spy = Spy()
    rpn.attach(model, RPNConfig(), noise=spy)
    causal = torch.ones(8, 8, dtype=torch.bool).tril().expand(3, 1, -1, -1)
    with pytest.warns(UserWarning, match="neither 2 nor 3 dimensions, so padding cannot be found"):
        model(ids, attention_mask=causal)
    assert spy.keep.all()


def test_packed_rows_are_divided_where_positions_restart(ids: torch.Tensor, mask: torch.Tensor) -> None:
    model = llama()
    spy = Spy()
    handle = rpn.attach(model, RPNConfig(scope="sequence"), noise=spy)
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7], [3, 4, 0, 1, 2, 3, 4, 0]])
    model(ids, position_ids=position_ids)
    expected = [[0, 0, 0, 1, 1, 2, 2, 2], [0] * 8, [0, 0, 0, 0, 0, 0, 0, 1]]
    assert spy.stream.pieces.tolist() == expected
    # With an attention mask, transformers does not treat them as packed either
    model(ids, position_ids=position_ids, attention_mask=mask)
    assert spy.stream.pieces is None
    handle.detach()

    rpn.attach(model, RPNConfig(scope="sequence", probability=1.0))
    weight = model.get_input_embeddings().weight.detach()
    noisy, plain = embedded(model, ids[:1], position_ids=position_ids[:1])[0], weight[ids[0]]
    assert not torch.equal(noisy, plain)
    for piece in (slice(0, 3), slice(3, 5), slice(5, 8)):
        assert torch.equal(noisy[piece].flatten().sort()[0], plain[piece].flatten().sort()[0])


def test_encoder_decoder_models_get_noise_in_the_encoder_only(ids: torch.Tensor, mask: torch.Tensor) -> None:
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
    # It is the same if encoder and decoder share one embedding module, as in earlier versions of transformers
    model.encoder.embed_tokens = model.decoder.embed_tokens = model.shared
    rpn.attach(model, RPNConfig(), noise=spy)
    model(input_ids=ids, attention_mask=mask, labels=labels)
    assert len(spy.calls) == 2
    assert torch.equal(spy.calls[1][0], model.shared(ids))


def test_multiple_choice_flattens_its_mask_like_its_tokens() -> None:
    model = bert(BertForMultipleChoice)
    spy = Spy()
    rpn.attach(model, RPNConfig(), noise=spy)
    ids = torch.randint(5, 60, (2, 3, 6))
    mask = torch.arange(6) < torch.tensor([[6, 5, 4], [3, 2, 1]])[:, :, None]
    model(input_ids=ids, attention_mask=mask)
    assert torch.equal(spy.keep, mask.view(6, 6))


def test_special_tokens_get_no_noise(ids: torch.Tensor, mask: torch.Tensor) -> None:
    model = bert()
    ids[:, 0] = 1
    ids[0, 7] = 2
    handle = rpn.attach(model, RPNConfig(exclude_special_tokens=True, probability=1.0), special_token_ids=iter([2, 1]))
    weight = model.get_input_embeddings().weight.detach()
    noisy, plain = embedded(model, ids, attention_mask=mask), weight[ids]
    special = (ids == 1) | (ids == 2)
    assert torch.equal(noisy[special | ~mask], plain[special | ~mask])
    assert not torch.equal(noisy, plain)
    with pytest.raises(ValueError, match="cannot be found without input_ids"):
        model(inputs_embeds=weight[ids])
    handle.detach()
    # Off by default, even if token ids are given
    rpn.attach(model, RPNConfig(probability=1.0), special_token_ids=[1, 2])
    assert not torch.equal(embedded(model, ids, attention_mask=mask)[:, 0], plain[:, 0])


def test_special_token_ids_are_required() -> None:
    with pytest.raises(ValueError, match=r"special_token_ids=tokenizer\.all_special_ids"):
        rpn.attach(bert(), RPNConfig(exclude_special_tokens=True))
