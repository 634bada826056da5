"""lm-evaluation-harness gives an adapter the scores of the merged model."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from families import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import sparse_zero.peft  # noqa: F401 - registers the method
from sparse_zero.adapters.merging import write_merged
from sparse_zero.adapters.save_and_load import save_adapter
from sparse_zero.model.sparsify import sparsify
from sparse_zero.selection.config import SparseConfig

if os.environ.get("CI") != "true":
    pytest.importorskip("lm_eval")

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["<pad>", "<eos>", "<unk>", *LETTERS]
TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    },
    "text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 3, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model, the adapter, the merged model, and tasks of 20 documents."""
    directory = tmp_path_factory.mktemp("lm-eval")
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(directory / "base")
    base = tiny("llama", vocab_size=len(WORDS), initializer_range=0.4, max_position_embeddings=96)
    base.save_pretrained(directory / "base")
    model = sparsify(
        AutoModelForCausalLM.from_pretrained(directory / "base"), SparseConfig(density=0.05, targets="all-linear")
    )
    with torch.no_grad():
        for weight in model.sparsity.weights.values():
            weight.delta.normal_()
    save_adapter(model, directory / "adapter")
    write_merged(directory / "adapter", directory / "merged")
    rows = [
        {
            "question": " ".join(LETTERS[i : i + 5]),
            "choices": [LETTERS[i + 5], LETTERS[i - 7], LETTERS[i]],
            "answer": 0,
        }
        for i in range(20)
    ]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "tasks").mkdir()
    files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(directory / "rows.jsonl")}}}
    for name, task in TASKS.items():
        content = {"task": name, "test_split": "test", **files, **task}
        (directory / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return directory


def scores(directory: Path, model_args: str) -> tuple[dict[str, float], list]:
    """The scores by task, and what the model answered. Args: model_args: as of the command line."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model="hf",
        model_args=model_args,
        tasks=[*TASKS],
        task_manager=TaskManager(include_path=str(directory / "tasks"), include_defaults=False),
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
    )
    metrics = {name: task["metric_list"][0]["metric"] for name, task in TASKS.items()}
    results = {name: float(found["results"][name][f"{metric},none"]) for name, metric in metrics.items()}
    return results, [sample["filtered_resps"] for name in TASKS for sample in found["samples"][name]]


def test_an_adapter_has_the_scores_of_the_merged_model(directory):
    """Bit for bit, with every log-probability and every generated answer; the base model has others."""
    adapter, answers = scores(directory, f"pretrained={directory / 'base'},peft={directory / 'adapter'}")
    assert (adapter, answers) == scores(directory, f"pretrained={directory / 'merged'}")
    base, others = scores(directory, f"pretrained={directory / 'base'}")
    assert adapter["choices"] != base["choices"]
    assert abs(adapter["text"] - base["text"]) > 1
    assert sum(a != b for a, b in zip(answers, others, strict=True)) > len(answers) / 2
