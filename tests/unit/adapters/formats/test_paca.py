"""Reading PEFT's PaCA, which PEFT has from 0.22 on. Files are written here as its `PacaModel` saves them, and the
logits are those of its arithmetic: weight[:, indices] + paca_alpha / r * delta.
"""

import json

import peft
import pytest
import torch
from format_cases import CAUSAL, CLASSIFIER, edit, logits, open_base, save_base, train, truncate
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from sparse_zero import UserError, load_adapter
from sparse_zero.adapters.formats import detect
from sparse_zero.adapters.formats.convert import convert

FILE = "adapter_model.safetensors"
TARGETS = {"llama": ["q_proj", "down_proj"], "bert": ["query", "attention.output.dense"]}


def task_of(family):
    return CLASSIFIER if family == "bert" else CAUSAL


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {family: save_base(root / family, family, task_of(family)) for family in TARGETS}


def paca(base, out, family, r=3, alpha=8, dtype=torch.float32):
    """Write an adapter. Returns: a model with its weights."""
    model, tensors = open_base(base, task_of(family)), {}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(tuple(TARGETS[family])):
                indices = torch.randperm(module.in_features, generator=generator)[:r].sort().values
                delta = torch.randn(module.out_features, r, generator=generator).to(dtype)
                module.weight[:, indices] += alpha / r * delta
                tensors[f"base_model.model.{name}.paca_delta"] = delta
                tensors[f"base_model.model.{name}.paca_indices"] = indices
        if family == "bert":
            for name, parameter in model.classifier.named_parameters():
                parameter += torch.randn(parameter.shape, generator=generator)
                tensors[f"base_model.model.classifier.{name}"] = parameter.clone()
    config = {
        "peft_type": "PACA",
        "task_type": "SEQ_CLS" if family == "bert" else "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "peft_version": "0.22.0",
        "r": r,
        "paca_alpha": alpha,
        "random_seed": None,
        "target_modules": TARGETS[family],
        "modules_to_save": ["classifier", "score"] if family == "bert" else None,
    }
    out.mkdir(parents=True)
    (out / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, out / FILE)
    return model


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("r", [1, 3])
def test_opens_here(bases, tmp_path, family, r):
    theirs = paca(bases[family], tmp_path / "paca", family, r)
    assert detect(tmp_path / "paca") == "paca"
    facts = convert(tmp_path / "paca", tmp_path / "ours")
    model = load_adapter(open_base(bases[family], task_of(family)), tmp_path / "ours")
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-6)
    assert not torch.allclose(logits(theirs), logits(open_base(bases[family], task_of(family))), atol=1e-2)
    assert facts["from"] == "PEFT PaCA"
    assert facts["selected_scalars"] == sum(
        t.numel() for name, t in load_file(tmp_path / "paca" / FILE).items() if name.endswith("paca_delta")
    )


def test_served_as_lora(bases, tmp_path):
    """PaCA's r columns are LoRA of rank r, exactly."""
    theirs = paca(bases["llama"], tmp_path / "paca", "llama")
    facts = convert(tmp_path / "paca", tmp_path / "lora", to="lora")
    model = peft.PeftModel.from_pretrained(open_base(bases["llama"], CAUSAL), tmp_path / "lora")
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-6)
    assert (facts["smallest_rank"], facts["largest_rank"]) == (3, 3)


@pytest.mark.skipif(not hasattr(peft, "PacaConfig"), reason="PaCA is in PEFT from 0.22 on")
def test_trained_with_peft_opens_here(bases, tmp_path):
    config = peft.PacaConfig(r=3, paca_alpha=8, target_modules=TARGETS["llama"], task_type="CAUSAL_LM")
    theirs = get_peft_model(open_base(bases["llama"], CAUSAL), config)
    train(theirs, CAUSAL)
    theirs.save_pretrained(tmp_path / "paca")
    convert(tmp_path / "paca", tmp_path / "ours")
    model = load_adapter(open_base(bases["llama"], CAUSAL), tmp_path / "ours")
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-6)


def first(tensors, ending):
    return next(name for name in tensors if name.endswith(ending))


def edited(change):
    return lambda directory: edit(directory / FILE, change)


def with_config(**fields):
    def change(directory):
        path = directory / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda d: truncate(d / FILE), "adapter_model.safetensors: damaged"),
        (with_config(r="3"), "adapter_config.json: damaged: r is '3' and paca_alpha 8"),
        (with_config(r=0), "adapter_config.json: damaged: r is 0"),
        (with_config(paca_alpha=None), "paca_alpha None, not numbers"),
        (with_config(r=2), "has columns [3] and differences [16, 3], but r is 2"),
        (edited(lambda t: t.pop(first(t, "_indices"))), "damaged: the columns of 'model.layers.0."),
        (edited(lambda t: t.pop(first(t, "_delta"))), "damaged: the differences of 'model.layers.0."),
        (edited(lambda t: t[first(t, "_indices")].fill_(0)), "contain duplicates"),
        (edited(lambda t: t[first(t, "_indices")].add_(10**6)), "are not valid for a weight of shape"),
        (edited(lambda t: t.update({first(t, "_delta"): torch.zeros(3)})), "and differences [3], but r is 3"),
        (edited(lambda t: t.update({first(t, "_delta"): torch.zeros(5, 3)})), "' has 5 rows in the adapter and 16 in"),
        (edited(lambda t: t.update(odd=torch.zeros(1))), "'odd' is not a name that PEFT writes"),
    ],
)
def test_damaged(bases, tmp_path, damage, complaint):
    paca(bases["llama"], tmp_path / "paca", "llama")
    damage(tmp_path / "paca")
    with pytest.raises(UserError) as refused:
        convert(tmp_path / "paca", tmp_path / "ours")
    assert complaint in str(refused.value)
    assert str(tmp_path / "paca") in str(refused.value)
    assert not (tmp_path / "ours").exists()
