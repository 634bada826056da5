"""Plans of recipes with an objective, against what TRL's trainers hold and what a model caches."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl_cases
import yaml
from datasets import Dataset
from peak_bytes import peak_bytes
from transformers import AutoModelForCausalLM

from launcher.cli import main
from sparse_zero.planning.activations import TILE
from sparse_zero.planning.generation import cache_tensors
from sparse_zero.planning.plan import allocations, device_bytes
from sparse_zero.planning.planned_run import PlannedRun, describe_run
from sparse_zero.recipe.recipe import load_recipe
from sparse_zero.training.build import training_arguments

WORDS = 12
"""Words of each text."""

COLUMNS = {
    "sft": {"text": "text"},
    "dpo": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
    "reward": {"chosen": "chosen", "rejected": "rejected"},
    "grpo": {"prompt": "prompt"},
    "rloo": {"prompt": "prompt"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    trl_cases.save_base(directory)
    return directory


@pytest.fixture
def plan_of(base: Path, tmp_path: Path):
    """plan_of(OBJECTIVE, **training): the facts of a recipe with batches of 4."""

    def write(objective: str | None, **training: Any) -> Path:
        data: dict[str, Any] = {"path": "none.jsonl", "columns": COLUMNS[objective or "sft"]}
        if objective not in ("grpo", "rloo"):
            data["max_length"] = training.pop("length", 16)
        else:
            training |= {"reward_funcs": "math:sqrt"}
        known = {"objective": objective, "per_device_train_batch_size": 4}
        recipe = {
            "model": {"name": str(base), "attn_implementation": "eager"},
            "data": data,
            "sparse": {"density": 0.05, "targets": "all-linear"},
            "training": {key: value for key, value in (known | training).items() if value is not None},
        }
        if objective is None:
            recipe["model"]["task"] = "causal-lm"
        file = tmp_path / f"{objective}.yaml"
        file.write_text(yaml.safe_dump(recipe))
        return file

    def plan_of(objective: str | None, **training: Any) -> PlannedRun:
        return describe_run(load_recipe(write(objective, **training)))

    plan_of.write = write
    return plan_of


def pairs() -> Dataset:
    """Texts of the same length, so that nothing is padded."""
    rows = [{"prompt": trl_cases.text(n, 3), "chosen": " " + trl_cases.text(n + 1, WORDS - 3)} for n in range(8)]
    return Dataset.from_list([row | {"rejected": " " + trl_cases.text(n, WORDS - 3)} for n, row in enumerate(rows)])


def preferences(objective: str) -> Dataset:
    if objective == "dpo":
        return pairs()
    return pairs().map(
        lambda row: {name: row["prompt"] + row[name] for name in ("chosen", "rejected")}, remove_columns="prompt"
    )


@pytest.fixture
def step(base: Path, tmp_path: Path):
    """step(OBJECTIVE): the model, a function that computes the loss of a batch of 4 pairs, and the tokens of each of
    the 8 sequences."""

    def step(objective: str) -> tuple[torch.nn.Module, Callable[[], torch.Tensor], int]:
        model = trl_cases.sparse_model(base, objective)
        model.set_attn_implementation("eager")
        run = trl_cases.trainer(objective, base, tmp_path, model, {"train_dataset": preferences(objective)})
        batch = run._prepare_inputs(next(iter(run.get_train_dataloader())))
        assert batch["input_ids"].shape[0] == 8
        assert batch["attention_mask"].all()
        run.model.train()
        return run.model, lambda: run.compute_loss(run.model, batch), batch["input_ids"].shape[1]

    return step


@pytest.mark.parametrize("objective", ["dpo", "reward"])
def test_activations_are_those_that_trls_trainer_saves(objective: str, step, plan_of) -> None:
    """Of both sequences of a pair, and none of the reference."""
    model, loss, tokens = step(objective)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss()
    counted = plan_of(objective, length=tokens).activations
    hidden = 8 * (tokens - 1) * 32 * 4 if objective == "dpo" else 0  # a plan counts them as part of the loss
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert counted.peak(False) - counted.loss + hidden == pytest.approx(found, rel=0.03)


def test_the_loss_of_dpo_is_computed_in_a_tile_of_logits(step, plan_of) -> None:
    """The peak of a step, which the tile dominates: it is as wide for 64 words as for 32,768."""
    _, loss, tokens = step("dpo")
    loss().backward()  # compiles the operators
    run = plan_of("dpo", length=tokens)
    found = peak_bytes(lambda: loss().backward())
    assert run.activations.loss > 4 * 8 * (tokens - 1) * TILE[1] > 0.9 * run.activations.loss
    assert run.activations.peak(False) == pytest.approx(found, rel=0.1)


def test_the_weights_are_there_once(plan_of) -> None:
    """That the trainers load no second model is tested in tests/unit/trl/test_reference_policy.py."""
    plain, dpo = plan_of(None), plan_of("dpo")
    states = [
        {each.what: each.bytes for each in allocations(run, run.zero_settings("2"), 2) if each.when == "always"}
        for run in (plain, dpo)
    ]
    assert states[0] == states[1]
    assert dpo.activations.layers == plan_of(None, per_device_train_batch_size=8).activations.layers
    assert any("without a second copy" in note for note in dpo.notes)


@pytest.mark.parametrize("objective", ["grpo", "rloo"])
def test_the_cache_of_a_generation_is_that_of_the_model(objective: str, base: Path, plan_of) -> None:
    """Of the completions of all micro-batches of a step, which are generated at once."""
    run = plan_of(objective, gradient_accumulation_steps=3, trl={"max_completion_length": 6, "num_generations": 2})
    assert run.tokens == 12
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    ids = torch.full((12, 6), 5)
    out = model.generate(ids, min_new_tokens=6, max_new_tokens=6, return_dict_in_generate=True)
    found = sum(tensor.nbytes for tensor in cache_tensors(out.past_key_values))
    assert run.generation.cache * 11 / 12 == found > 0  # the last token is not fed back
    assert run.generation.next_tokens == 12 * 12 * 64
    several = plan_of(objective, trl={"max_completion_length": 6, "steps_per_generation": 8, "num_generations": 2})
    assert several.generation.cache == run.generation.cache * 8 / 3


def test_a_generation_that_needs_more_than_backward_decides(plan_of) -> None:
    few = plan_of("grpo", trl={"max_completion_length": 8})
    many = plan_of("grpo", trl={"max_completion_length": 8, "steps_per_generation": 10_000})
    zero = few.zero_settings("2")
    assert device_bytes(many, zero, 1) > device_bytes(few, zero, 1)
    assert device_bytes(many, zero, 1) > many.generation.cache
    assert sum(each.bytes for each in allocations(few, zero, 1) if each.when == "generation") == (
        few.generation.cache + few.generation.next_tokens
    )
    at_3 = [each for each in allocations(few, few.zero_settings("3"), 4) if each.when == "generation"]
    assert at_3[2].bytes == 4 * (sum(few.sizes.base) + sum(few.sizes.selected))
    apart = plan_of("grpo", trl={"max_completion_length": 8, "ds3_gather_for_generation": False})
    assert len([each for each in allocations(apart, apart.zero_settings("3"), 4) if each.when == "generation"]) == 2


def test_the_command(plan_of, capfd) -> None:
    file = str(plan_of.write("grpo", trl={"max_completion_length": 6}))
    assert main(["plan", file, "--ranks", "1", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["tokens"] == 12
    assert any("completions of 6 tokens, and prompts as long" in note for note in found["notes"])
    assert {"cache", "next tokens"} <= {each["what"] for each in found["stages"][0]["holds"]}
    assert main(["plan", file, "--ranks", "1"]) == 0
    assert "cache in generation" in capfd.readouterr().out


def test_default_learning_rates(plan_of, caplog) -> None:
    """At 1%: those of SFT and of classifiers are measured; TRL's own default of the others is 1/20 of that of SFT."""
    sparse = {"sft": 1e-2, "reward": 3e-3, "dpo": 5e-4, "grpo": 5e-4, "rloo": 5e-4}
    for objective, rate in sparse.items():
        file = plan_of.write(objective, use_cpu=True, per_device_train_batch_size=8)
        recipe = load_recipe(file, ["sparse.density=0.01"])
        assert training_arguments(recipe).learning_rate == rate
        assert f"{rate:g}, the default for {objective}" in caplog.text
