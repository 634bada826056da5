"""training.use_liger_kernel on sparse models: Liger's loss under Triton's interpreter, in a process of its own.

Liger changes classes of transformers, and Triton decides when it loads a kernel whether it interprets it. Of Liger's
kernels the interpreter runs that of the loss. The kernels of rotary positions, norms and gates do not concern the
selected weights: the modules in which these are stay, and compute as before.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import deepspeed
import pytest
import torch
from accelerate.state import AcceleratorState
from families import tiny
from transformers import LlamaForCausalLM, PreTrainedModel

from sparse_zero import SparseConfig, SparseTrainer, UserError, sparsify
from sparse_zero.ranks.network import free_port
from sparse_zero.recipe.training import TrainingArguments
from sparse_zero.zero.parameters import full_shape

HEADS = ["frozen", "whole", "tied"]
STAGE_3_HEADS = ["selected-stage-3"]
LOSS_ONLY = {"rope": False, "rms_norm": False, "swiglu": False}


STAGE_3 = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    # By default ZeRO would keep all of so small a model whole
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0},
}


def base_model(head: str, out: Path, partitioned: bool) -> PreTrainedModel:
    if not partitioned:
        return tiny("llama", tie_word_embeddings=head == "tied")
    deepspeed.init_distributed(verbose=False)  # on a CPU Accelerate starts torch's group only
    model = LlamaForCausalLM.from_pretrained(out.parent / "base")
    assert model.lm_head.weight.numel() == 0
    return model


def run(head: str, liger: bool, out: Path, stage_3: bool = False) -> dict:
    """Train on uneven batches. Returns: the losses and gradient norms, and what an evaluation sees."""
    settings = {"use_liger_kernel": True, "liger_kernel_config": LOSS_ONLY} if liger else {}
    arguments = TrainingArguments(
        str(out),
        use_cpu=True,
        report_to="none",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        save_strategy="no",
        disable_tqdm=True,
        deepspeed=STAGE_3 if stage_3 else None,
        **settings,
    )
    model, positions = base_model(head, out, stage_3), {}
    selected = {"selected": "lm_head.weight", "tied": "embed_tokens.weight"}.get(head, "proj.weight")
    for name, parameter in model.named_parameters():
        if name.endswith(("proj.weight", selected)):
            positions[name] = torch.arange(3, full_shape(parameter).numel(), 37)
    sparsify(model, SparseConfig(modules_to_save=["lm_head"] if head == "whole" else None), positions=positions)
    rows = [[3 + (row * 7 + column) % 50 for column in range(6)] for row in range(16)]
    data = [{"input_ids": row, "labels": [-100] * (i % 5) + row[i % 5 :]} for i, row in enumerate(rows)]
    trainer = SparseTrainer(
        model,
        arguments,
        train_dataset=data,
        eval_dataset=data[:4],
        compute_metrics=lambda prediction: {"shape": list(prediction.predictions.shape)},
    )
    trainer.train()
    log = [[entry["loss"], entry["grad_norm"]] for entry in trainer.state.log_history if "loss" in entry]
    evaluation = trainer.evaluate()
    return {
        "log": log,
        "evaluation": evaluation["eval_loss"],
        "logits": evaluation["eval_shape"],
        "forward": model.forward.__func__.__module__,
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    pytest.importorskip("liger_kernel")
    pytest.importorskip("triton")
    out = tmp_path_factory.mktemp("liger") / "runs.json"
    tiny("llama", tie_word_embeddings=False).save_pretrained(out.parent / "base")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([p for p in sys.path if p])}
    environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment["MASTER_PORT"] = str(free_port())
    subprocess.run([sys.executable, __file__, str(out)], env=environment, check=True, timeout=600)
    return json.loads(out.read_text())


@pytest.mark.parametrize("head", [*HEADS, *STAGE_3_HEADS])
def test_the_same_run(runs, head):
    plain, liger = runs[f"{head}-plain"], runs[f"{head}-liger"]
    torch.testing.assert_close(torch.tensor(liger["log"]), torch.tensor(plain["log"]), rtol=1e-5, atol=1e-5)
    assert liger["evaluation"] == pytest.approx(plain["evaluation"], rel=1e-5)
    assert liger["logits"] == plain["logits"] == [4, 6, 96]
    assert "liger_kernel" in liger["forward"]
    assert "liger_kernel" not in plain["forward"]
    assert plain["log"][0][0] != plain["log"][-1][0]


def trainer_with_liger(out, model=None):
    arguments = TrainingArguments(str(out), use_cpu=True, report_to="none", use_liger_kernel=True)
    return SparseTrainer(model or sparsify(tiny("llama"), SparseConfig(density=0.1)), arguments)


def test_liger_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("sparse_zero.training.loss_options.is_liger_kernel_available", lambda: False)
    with pytest.raises(
        UserError, match=r"training.use_liger_kernel: the package liger-kernel is missing; pip install"
    ):
        trainer_with_liger(tmp_path)


def test_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr("sparse_zero.training.loss_options.is_liger_kernel_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match=r"Liger's kernels need a GPU; use one, or set training.chunked_loss instead"):
        trainer_with_liger(tmp_path)


def test_a_model_that_liger_does_not_know(tmp_path, monkeypatch, caplog):
    """Liger itself says nothing."""
    pytest.importorskip("liger_kernel")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    trainer_with_liger(tmp_path, sparsify(tiny("bert", "sequence-classification"), SparseConfig(density=0.1)))
    assert "Liger has no kernels for models of type 'bert'; nothing changes" in caplog.text
    caplog.clear()
    trainer_with_liger(tmp_path)
    assert "Liger" not in caplog.text


if __name__ == "__main__":
    found, file = {}, Path(sys.argv[1])
    # Stage 3 last: transformers keeps on partitioning models
    for name, kind in [(name, kind) for name in (*HEADS, *STAGE_3_HEADS) for kind in ("plain", "liger")]:
        head, _, stage = name.partition("-")
        found[f"{name}-{kind}"] = run(head, kind == "liger", file.parent / f"{name}-{kind}", bool(stage))
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    file.write_text(json.dumps(found))
