"""One rank of the ways to train a sparse model. Each as short as a user would write it."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import deepspeed
import tiny
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments, default_data_collator

from sparse_zero import (
    SparseConfig,
    SparseTrainer,
    disable_adapter,
    merge_adapter,
    merge_and_unload,
    save_adapter,
    sparsify,
    unmerge_adapter,
)
from sparse_zero.zero.parameters import gathered

TASK, STEPS, BATCH, LEARNING_RATE = "sequence-classification", 8, 4, 3e-2


def examples() -> list[dict]:
    return tiny.examples(TASK, STEPS * BATCH * dist.get_world_size())


def batches_of_this_rank() -> list[dict[str, torch.Tensor]]:
    loader = DataLoader(examples(), batch_size=BATCH, collate_fn=default_data_collator)
    return [batch for i, batch in enumerate(loader) if i % dist.get_world_size() == dist.get_rank()]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(filter(lambda p: p.requires_grad, model.parameters()), LEARNING_RATE, weight_decay=0.0)


def reference(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    """The base model's outputs, between a forward and its backward, as in DPO."""
    with disable_adapter(model), torch.no_grad():
        model(**batch)


def torch_loop(model: PreTrainedModel) -> list[float]:
    optimizer = adamw(model)
    wrapped, losses = DistributedDataParallel(model), []
    for batch in batches_of_this_rank():
        loss = wrapped(**batch).loss
        reference(wrapped, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def accelerate_loop(model: PreTrainedModel) -> list[float]:
    accelerator = Accelerator(cpu=True)
    loader = DataLoader(examples(), batch_size=BATCH, collate_fn=default_data_collator)
    model, optimizer, loader = accelerator.prepare(model, adamw(model), loader)
    losses = []
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def deepspeed_loop(model: PreTrainedModel, stage: int) -> list[float]:
    """Also saves and merges, through the engine, into the working directory."""
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1.0
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw(model), config=config)
    losses = []
    for batch in batches_of_this_rank():
        loss = engine(**batch).loss
        reference(engine, batch)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    save_adapter(engine, f"adapter-deepspeed{stage}", is_main_process=engine.global_rank == 0)
    merge_adapter(engine)
    unmerge_adapter(engine)
    merge_and_unload(engine)
    with gathered(list(model.parameters())):
        if engine.global_rank == 0:
            model_state = {name: value.clone() for name, value in model.state_dict().items()}
            torch.save(model_state, f"merged-deepspeed{stage}.pt")
    return losses


def trainer(
    model: PreTrainedModel, kind: type[Trainer] = SparseTrainer, stage: int | None = None, saved: str | None = None
) -> list[float]:
    """Args: saved: the directory into which the Trainer saves the model."""
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
    }
    arguments = TrainingArguments(
        deepspeed=config if stage else None,
        output_dir="unused",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
        train_sampling_strategy="sequential",
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0,
    )
    runner = kind(model, arguments, train_dataset=examples())
    runner.train()
    if saved:
        runner.save_model(saved)
        save_adapter(model, f"{saved}-by-hand", is_main_process=dist.get_rank() == 0)
    return [entry["loss"] for entry in runner.state.log_history if "loss" in entry]


WAYS: dict[str, Callable[[PreTrainedModel], list[float]]] = {
    "torch": torch_loop,
    "accelerate": accelerate_loop,
    "trainer": trainer,
    "deepspeed1": lambda model: deepspeed_loop(model, 1),
    "deepspeed2": lambda model: deepspeed_loop(model, 2),
    "deepspeed3": lambda model: deepspeed_loop(model, 3),
    "plain-trainer": lambda model: trainer(model, Trainer, saved="plain"),
    "plain-trainer2": lambda model: trainer(model, Trainer, 2, "plain2"),
    "plain-trainer3": lambda model: trainer(model, Trainer, 3, "plain3"),
}


def main(base: str, out: str) -> None:
    os.chdir(out)
    dist.init_process_group("gloo")
    losses = {}
    for way, train in WAYS.items():
        model = tiny.AUTO_CLASS[TASK].from_pretrained(base)
        sparsify(model, SparseConfig(density=tiny.density_of(model, TASK)))
        losses[way] = train(model.train())
    Path(f"rank{os.environ['RANK']}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(*sys.argv[1:])
