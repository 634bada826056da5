"""LoRA, DoRA, full fine-tuning and the head on two ranks, partitioned by ZeRO: the results of one process."""

import json
from pathlib import Path

import peft
import pytest
import torch
from recipes import write_recipe
from trainer_cases import run_cases, zero_config
from transformers import AutoModelForCausalLM

from sparse_zero.recipe import shipped
from sparse_zero.recipe.recipe import load_recipe
from sparse_zero.training import run

pytest.importorskip("torchao")
pytestmark = pytest.mark.distributed

CASES = {
    # Before stage 3, which replaces F.linear of its process for good, by one that torchao's tensors do not have
    "lora on int8_weight_only": ("causal-lm", None),
    "dora on int8_weight_only": ("causal-lm", "zero2.json"),
    "lora": ("causal-lm", "zero3-all.json"),
    "dora": ("causal-lm", "zero2.json"),
    # Prefetches: after an evaluation, parameters are in flight
    "full": ("causal-lm", str(shipped.directory() / "zero3.json")),
    "head": ("sequence-classification", "zero2.json"),
}
"""By method, and what the base is quantised to: the task and the DeepSpeed configuration."""


@pytest.fixture(scope="module")
def recipe_of(bases: dict, data: Path, tmp_path_factory: pytest.TempPathFactory):
    """The recipe of a method: batches of 4 examples in each step, whatever the number of ranks."""
    folder = tmp_path_factory.mktemp("methods")
    (folder / "zero2.json").write_text(json.dumps(zero_config(2)))
    # Partitions LoRA's small matrices, too
    (folder / "zero3-all.json").write_text(json.dumps(zero_config(3, stage3_param_persistence_threshold=0)))

    def recipe_of(name: str) -> Path:
        task, _ = CASES[name]
        method, _, kind = name.partition(" on ")
        training = {"method": method, "max_steps": 3, "learning_rate": 1e-3, "eval_on_start": method == "full"}
        model = {"quantization": kind} if kind else {}
        model |= {"name": str(bases[task]), "task": task}
        return write_recipe(folder / f"{name}.yaml", bases[task], task, data, training=training, model=model)

    return recipe_of


@pytest.fixture(scope="module")
def on_two_ranks(recipe_of, fork_server, tmp_path_factory: pytest.TempPathFactory):
    """The directory of the runs, and what rank 0 says of each."""
    out = tmp_path_factory.mktemp("two-ranks")
    cases = []
    for name, (_, deepspeed) in CASES.items():
        file = recipe_of(name)
        overrides = ["training.per_device_train_batch_size=2"]
        if deepspeed is not None:
            overrides.append(f"training.deepspeed={file.parent / deepspeed}")
        cases.append({"name": name, "recipe": str(file), "overrides": overrides, "merge": name == "lora"})
    return out, run_cases(fork_server, 2, cases, out, worker="methods_worker")[0]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_process(name, recipe_of, on_two_ranks, tmp_path) -> None:
    _, seen = on_two_ranks
    file = recipe_of(name)
    alone = run.train(load_recipe(file, [f"training.output_dir={tmp_path / 'alone'}"]), str(file))
    here = seen[name]
    assert here["loss"] == pytest.approx(alone["loss"], abs=1e-4)
    assert here["trainable_parameters"] == alone["trainable_parameters"]
    # The moments; with ZeRO also the master weights, on two ranks
    share = (12 / 2 if CASES[name][1] else 8) * here["trainable_parameters"]
    assert all(share <= count <= 1.2 * share + 100 for count in here["optimizer_bytes_per_rank"])


def test_the_written_models_are_complete_at_stage_3(recipe_of, on_two_ranks) -> None:
    """peft#2450, trl#4416: adapters and modules that were written empty."""
    out, _ = on_two_ranks
    base = str(load_recipe(recipe_of("lora")).model.source)
    opened = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype="float32"), out / "lora" / "adapter"
    ).eval()
    assert all(parameter.numel() for parameter in opened.parameters())
    assert any(parameter.abs().max() > 0 for name, parameter in opened.named_parameters() if "lora_B" in name)
    merged = AutoModelForCausalLM.from_pretrained(out / "lora" / "merged", dtype="float32").eval()
    ids = torch.arange(5, 25).view(1, -1)
    with torch.no_grad():
        assert torch.allclose(opened(ids).logits, merged(ids).logits, atol=1e-5)
    whole = AutoModelForCausalLM.from_pretrained(out / "full" / "model", dtype="float32")
    before = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    for name, parameter in whole.named_parameters():
        assert parameter.shape == before.get_parameter(name).shape
        assert not torch.equal(parameter, before.get_parameter(name)), name
