"""The trainers of transformers and TRL with adapters of `sparse_zero.peft`."""

import shutil
from pathlib import Path

import peft
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from peft_cases import CAUSAL, assert_same, fresh, in_peft, logits
from transformers import AutoTokenizer, Trainer, TrainingArguments, pipeline

from sparse_zero.adapters.save_and_load import load_adapter
from sparse_zero.peft import SparseZeroConfig

ROWS = [{"input_ids": [3 + i, 4 + i, 9, 5], "labels": [3 + i, 4 + i, 9, 5]} for i in range(24)]


def arguments(directory: Path, **settings) -> TrainingArguments:
    settings = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 0.02} | settings
    return TrainingArguments(
        str(directory), per_device_train_batch_size=4, use_cpu=True, report_to=[], disable_tqdm=True, **settings
    )


def trainer(bases, directory: Path, model: PeftModel | None = None, **settings) -> Trainer:
    data = Dataset.from_list(ROWS)
    model = model or in_peft(bases["llama"])
    return Trainer(model, arguments(directory, **settings), train_dataset=data, eval_dataset=data)


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def test_the_trainer_saves_and_resumes(tmp_path, bases):
    run = trainer(bases, tmp_path)
    run.train()
    expected = logits(run.model.eval())
    assert losses(run)[-1] < losses(run)[0]
    checkpoint = tmp_path / "checkpoint-4"
    assert_same(PeftModel.from_pretrained(fresh(bases["llama"]), checkpoint), expected)
    assert_same(load_adapter(fresh(bases["llama"]), checkpoint), expected)
    resumed = trainer(bases, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(run)
    assert_same(resumed.model.eval(), expected)


def test_the_best_model_is_loaded(tmp_path, bases):
    """Here the one with the largest loss, which is not the last."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "metric_for_best_model": "eval_loss"}
    run = trainer(bases, tmp_path, load_best_model_at_end=True, greater_is_better=True, **settings)
    run.train()
    best = max((e["eval_loss"], e["step"]) for e in run.state.log_history if "eval_loss" in e)[1]
    assert best != 4
    assert run.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    expected = logits(PeftModel.from_pretrained(fresh(bases["llama"]), tmp_path / f"checkpoint-{best}"))
    assert_same(run.model.eval(), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_in_the_trainer(tmp_path, bases, use_reentrant):
    run = trainer(bases, tmp_path / "plain", save_strategy="no")
    run.train()
    again = trainer(
        bases,
        tmp_path / "checkpointed",
        save_strategy="no",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
    )
    again.train()
    assert losses(again) == pytest.approx(losses(run), rel=1e-5)


def test_bf16_in_the_trainer(tmp_path, bases):
    run = trainer(bases, tmp_path / "plain", save_strategy="no")
    run.train()
    again = trainer(bases, tmp_path / "bf16", save_strategy="no", bf16=True)
    again.train()
    assert losses(again) == pytest.approx(losses(run), rel=2e-2)


@pytest.fixture(scope="module")
def chat_base(tmp_path_factory, bases, tokenizer_dir) -> Path:
    """A base model with a tokenizer, for TRL and pipelines."""
    directory = tmp_path_factory.mktemp("qwen2")
    shutil.copytree(tokenizer_dir, directory, dirs_exist_ok=True)
    model = fresh(bases["qwen2"])
    model.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)  # of the model's class, which adds a token
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def sft(base: Path, directory: Path, **settings):
    trl = pytest.importorskip("trl")
    tokenizer = AutoTokenizer.from_pretrained(base)
    settings = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 0.02} | settings
    config = trl.SFTConfig(
        str(directory),
        bf16=False,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **settings,
    )
    data = Dataset.from_list([{"input_ids": row["input_ids"]} for row in ROWS])
    return trl.SFTTrainer(
        str(base),
        config,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=SparseZeroConfig(**CAUSAL | {"density": 0.02}),
    )


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_sft_trainer(tmp_path, chat_base, gradient_checkpointing):
    run = sft(chat_base, tmp_path, gradient_checkpointing=gradient_checkpointing)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    trainable = [name for name, p in run.model.named_parameters() if p.requires_grad]
    assert trainable
    assert all(name.endswith("_delta") for name in trainable)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    with torch.no_grad():
        found = model(torch.tensor([[3, 4, 9]])).logits
        assert torch.equal(found.float(), run.model.eval()(torch.tensor([[3, 4, 9]])).logits.float())
    resumed = sft(chat_base, tmp_path, gradient_checkpointing=gradient_checkpointing)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(run)


def test_a_pipeline_of_an_adapter(tmp_path, chat_base):
    run = sft(chat_base, tmp_path)
    run.train()
    run.save_model(tmp_path / "adapter")
    generate = pipeline("text-generation", model=str(tmp_path / "adapter"))
    settings = {"max_new_tokens": 5, "do_sample": False}
    found = generate("a good film", return_tensors=True, **settings)[0]["generated_token_ids"]
    merged = run.model.merge_and_unload().eval()
    tokens = generate.tokenizer("a good film", return_tensors="pt")
    assert found == merged.generate(**tokens, **settings)[0].tolist()
