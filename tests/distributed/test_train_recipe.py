"""`sparse_zero.train` on two ranks, from a recipe to the merged model, through the launchers that users have."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from ranks import Run, run_ranks
from recipes import write_recipe
from safetensors.torch import load_file
from sklearn.metrics import f1_score, matthews_corrcoef
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainer_cases import zero_config
from transformers import AutoTokenizer

from sparse_zero.recipe.recipe import load_recipe
from sparse_zero.training.evaluate import evaluate

pytestmark = pytest.mark.distributed

WAYS = {
    "deepspeed": ("sequence-classification", zero_config(2), {}),
    "torchrun": ("causal-lm", zero_config(3, stage3_param_persistence_threshold=0), {"bf16": True}),
}
"""By launcher: the task, the DeepSpeed configuration, and what else is set in `training`."""


@dataclass
class Trained:
    task: str
    base: Path
    recipe: Path
    run: Run
    out: Path

    @property
    def results(self) -> dict[str, Any]:
        return json.loads((self.out / "results.json").read_text())

    @property
    def adapter(self) -> dict[str, torch.Tensor]:
        return load_file(self.out / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module", params=WAYS)
def trained(
    request: pytest.FixtureRequest, bases: dict, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    task, config, training = WAYS[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    (directory / "zero.json").write_text(json.dumps(config))
    training = training | {"deepspeed": "zero.json", "report_to": "tensorboard", "logging_steps": 4}
    recipe = write_recipe(directory / "run.yaml", bases[task], task, data, training=training)
    run = run_ranks(2, "sparse_zero.train", recipe, "--merge", launcher=request.param)
    return Trained(task, bases[task], recipe, run, directory / "run")


@pytest.fixture(scope="module")
def measured(trained: Trained, data: Path) -> dict[str, float]:
    """The figures of the merged model, measured by hand on the test file."""
    model = tiny.AUTO_CLASS[trained.task].from_pretrained(trained.out / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(trained.out / "merged")
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    with torch.no_grad():
        if trained.task == "causal-lm":
            losses = torch.cat([_completion_losses(model, tokenizer, row) for row in rows])
            return {"loss": losses.mean().item(), "perplexity": losses.mean().exp().item()}
        logits = torch.cat([model(**tokenizer(row["text"], return_tensors="pt")).logits for row in rows])
    labels = torch.tensor([model.config.label2id[row["label"]] for row in rows])
    predicted = logits.argmax(-1)
    return {
        "loss": F.cross_entropy(logits, labels).item(),
        "accuracy": (predicted == labels).float().mean().item(),
        "f1": float(f1_score(labels, predicted)),
        "matthews_correlation": float(matthews_corrcoef(labels, predicted)),
    }


def _completion_losses(model: torch.nn.Module, tokenizer: Any, row: dict[str, str]) -> torch.Tensor:
    """The loss of each word of the completion and of the end that follows."""
    words = f"{row['prompt']} {row['completion']}".split()
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.convert_tokens_to_ids(words), tokenizer.eos_token_id]])
    counted = len(row["completion"].split()) + 1
    return F.cross_entropy(model(ids).logits[0, -counted - 1 : -1].float(), ids[0, -counted:], reduction="none")


def test_the_run_leaves_no_process(trained: Trained) -> None:
    assert trained.run.left_over == []


def test_rank_0_tells_the_progress_of_all(trained: Trained) -> None:
    lines = re.findall(r"step (\d+)/16  loss .*samples/s .*tokens/s .*eta", trained.run.output)
    assert lines == ["4", "8", "12", "16"]
    (directory,) = Path(trained.results["paths"]["logs"]).iterdir()
    losses = EventAccumulator(str(directory)).Reload().Scalars("train/loss")
    assert [loss.step for loss in losses] == [4, 8, 12, 16]


def test_results_describe_the_run(trained: Trained) -> None:
    results, adapter = trained.results, trained.adapter
    total = sum(parameter.numel() for parameter in load_file(trained.base / "model.safetensors").values())
    assert (results["world_size"], results["zero_stage"]) == (2, 2 if trained.task != "causal-lm" else 3)
    assert results["total_parameters"] == total
    assert results["trainable_parameters"] == round(0.02 * total) == sum(values.numel() for values in adapter.values())
    assert 0 < results["train_seconds"] < trained.run.seconds
    files = [trained.out / "adapter" / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    assert results["adapter_bytes"] == sum(file.stat().st_size for file in files)


def test_results_tell_the_memory_of_each_rank(trained: Trained) -> None:
    state, peak = trained.results["optimizer_bytes_per_rank"], trained.results["peak_memory_bytes_per_rank"]
    assert (len(state), len(peak)) == (2, 2)
    share = 12 * trained.results["trainable_parameters"] / 2
    assert all(share <= bytes <= share + 12 * len(trained.adapter) for bytes in state)  # padded by a scalar each
    assert all(100 * 2**20 < bytes < 4 * 2**30 for bytes in peak)


def test_results_are_what_the_merged_model_does(trained: Trained, measured: dict[str, float]) -> None:
    tolerance = 1e-4 if trained.task == "sequence-classification" else 1e-2  # the language model is in bfloat16
    assert {name: trained.results[name] for name in measured} == pytest.approx(measured, rel=tolerance)


def test_the_base_was_evaluated_before(trained: Trained) -> None:
    results = trained.results
    assert results["loss_before"] > results["loss"] + 0.01
    if trained.task == "causal-lm":
        assert results["perplexity_before"] == pytest.approx(math.exp(results["loss_before"]))
    else:
        assert 0 <= results["accuracy_before"] <= 1


def test_the_merged_model_is_the_base_but_for_the_adapter(trained: Trained) -> None:
    base = load_file(trained.base / "model.safetensors")
    merged = load_file(trained.out / "merged" / "model.safetensors")
    assert merged.keys() == base.keys()
    changed = {name: int((merged[name] != values.to(merged[name].dtype)).sum()) for name, values in base.items()}
    assert {name for name, count in changed.items() if count} == trained.adapter.keys()
    assert all(changed[name] <= values.numel() for name, values in trained.adapter.items())


def test_evaluate_gives_the_figures_of_the_run(trained: Trained) -> None:
    figures = evaluate(load_recipe(trained.recipe), trained.out / "adapter")
    assert figures == pytest.approx({name: trained.results[name] for name in figures}, abs=1e-5)
    assert len(figures) >= 2
