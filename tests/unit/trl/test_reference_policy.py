"""The reference of DPO and GRPO costs no second model, and computes what a second model would."""

import contextlib
import gc
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
import trl_cases
from transformers import AutoTokenizer, PreTrainedModel
from trl_cases import losses, trainer

from sparse_zero import UserError, disable_adapter, load_adapter, merge_and_unload, save_adapter
from sparse_zero.model.reference import keep_reference, reference_values

KINDS: dict[str, dict[str, Any]] = {
    "single": {},
    "strips": {"granularity": 8},
    "columns": {"columns": 0.5, "targets": "all-linear"},
    "whole columns": {"columns": "whole", "targets": "all-linear"},
    "norm in full": {"modules_to_save": ["norm"]},
    "dropout": {"dropout": 0.3},
    "head": {"targets": ["v_proj", "lm_head"], "density": 0.1},
}


def randomised(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """As after a training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def loaded(base: Path, out: Path, **config: Any) -> PreTrainedModel:
    """A model with an adapter that was trained, and loaded."""
    save_adapter(randomised(trl_cases.sparse_model(base, "dpo", **config)), str(out))
    model = trl_cases.base_model(base, "dpo")
    load_adapter(model, str(out))
    return model


def storages() -> int:
    """The bytes of all tensors' storages. Tensors that torch.compile's traces have left have none."""
    gc.collect()
    found = {}
    for each in gc.get_objects():
        if isinstance(each, torch.Tensor):
            storage = each.untyped_storage()
            with contextlib.suppress(RuntimeError):
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@pytest.mark.parametrize("objective", ["dpo", "grpo"])
@pytest.mark.parametrize("is_loaded", [False, True], ids=["new", "loaded"])
def test_there_is_no_second_copy_of_the_weights(objective: str, is_loaded: bool, base: Path, tmp_path: Path):
    model = loaded(base, tmp_path / "sft") if is_loaded else trl_cases.sparse_model(base, objective)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    before = storages()
    run = trainer(objective, base, tmp_path / "run", model=model)
    grown = storages() - before
    n = model.sparsity.selected_parameters
    assert grown <= (4 * n if is_loaded else 0) + 4096 < weights / 3
    assert run.ref_model.is_as_loaded == is_loaded
    del run


def test_trl_alone_has_a_second_copy(base: Path, tmp_path: Path):
    model = trl_cases.sparse_model(base, "dpo")
    model.config._name_or_path = str(base)
    weights, before = sum(p.numel() * p.element_size() for p in model.parameters()), storages()
    run = trl.DPOTrainer(
        model,
        args=trl_cases.arguments("dpo", tmp_path),
        train_dataset=trl_cases.rows("dpo"),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    assert storages() - before > 0.9 * weights
    del run


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_of_a_loaded_adapter_is_the_adapter_as_loaded(kind: str, base: Path, tmp_path: Path):
    """Its losses are those of TRL's DPO with a second, merged model; the first one is ln 2."""
    ours = trainer("dpo", base, tmp_path / "ours", model=loaded(base, tmp_path / "sft", **KINDS[kind]))
    ours.train()
    reference = merge_and_unload(loaded(base, tmp_path / "sft", **KINDS[kind]))
    plain = trl.DPOTrainer(
        loaded(base, tmp_path / "sft", **KINDS[kind]),
        reference,
        args=trl_cases.arguments("dpo", tmp_path / "theirs", save_strategy="no"),
        train_dataset=trl_cases.rows("dpo"),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    plain.train()
    if kind != "dropout":  # the policy has it, the reference has not
        assert losses(ours)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(ours) == pytest.approx(losses(plain), abs=1e-6)
    assert losses(ours)[3] != pytest.approx(math.log(2), abs=1e-3)


def test_a_resumed_run_has_the_reference_as_loaded(base: Path, tmp_path: Path):
    whole = trainer("dpo", base, tmp_path / "run", model=loaded(base, tmp_path / "sft"))
    whole.train()
    resumed = trainer("dpo", base, tmp_path / "run", model=loaded(base, tmp_path / "sft"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)


def test_precomputed_references(base: Path, tmp_path: Path):
    whole = trainer("dpo", base, tmp_path / "one", model=loaded(base, tmp_path / "sft"))
    whole.train()
    precomputed = trainer(
        "dpo", base, tmp_path / "two", model=loaded(base, tmp_path / "sft"), precompute_ref_log_probs=True
    )
    precomputed.train()
    assert losses(precomputed) == pytest.approx(losses(whole), abs=1e-5)


@pytest.mark.parametrize("kind", ["single", "strips", "norm in full"])
def test_the_model_changes_between_its_values_and_the_references(kind: str, base: Path, tmp_path: Path):
    model, ids = loaded(base, tmp_path / "sft", **KINDS[kind]).eval(), torch.tensor([[1, 9, 8, 7]])

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids).logits

    with disable_adapter(model):
        original = logits()
    assert keep_reference(model)
    as_loaded = logits()
    randomised(model, seed=1)
    trained = logits()
    with reference_values(model):
        assert torch.equal(logits(), as_loaded)
    assert torch.equal(logits(), trained)
    with disable_adapter(model):
        assert torch.equal(logits(), original)
        with pytest.raises(UserError, match="leave disable_adapter first"), reference_values(model):
            pass
    assert not torch.equal(trained, as_loaded)


def test_a_new_adapter_keeps_no_values(base: Path):
    model = trl_cases.sparse_model(base, "dpo", modules_to_save=["norm"])
    assert not keep_reference(model)
    assert model.sparsity.reference is None
