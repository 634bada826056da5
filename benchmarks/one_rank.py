"""The memory of one rank during training, and the time of its optimizer. Started by memory.py and scaling.py.

    torchrun --nproc-per-node 2 benchmarks/one_rank.py --method sparse --way zero2 --out DIR

Writes DIR/rank-0.json and so on. Bytes are measured in the second step, when the optimizer has its state.
"""

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from allocations import Meter, bytes_of, peak_of
from methods import (
    LEARNING_RATE,
    METHODS,
    SHAPES,
    TARGETS,
    Budget,
    llama,
    llama_config,
    loss_of,
    loss_of_frozen,
    trained_parameters,
)
from torch import nn
from transformers import LlamaConfig

from sparse_zero.model import layers, products, weight_tensor
from sparse_zero.model.sparsity import Sparsity
from sparse_zero.zero.parameters import fit_buckets, optimizer_bytes, optimizer_state_tensors

WAYS = ("plain", "ddp", "zero2", "zero3")
GRADIENT_NODES = tuple(
    f"{function.__name__}Backward"
    for function in (layers._SampledGradient, products.SampledGradient, weight_tensor._ReadRows)
)
"""The autograd nodes that compute gradients of deltas."""
TIMED_STEPS = 3


@dataclass
class Training:
    """A model on this rank, and the three parts of a training step."""

    model: nn.Module
    trained: list[nn.Parameter]
    forward: Callable[[], torch.Tensor]
    backward: Callable[[torch.Tensor], Any]
    update: Callable[[], Any]
    optimizer: Any
    """torch's optimizer, or DeepSpeed's wrapper."""
    inner: torch.optim.Optimizer | None


def start(
    model: nn.Module, ids: torch.Tensor, way: str, config: LlamaConfig, ranks: int, dtype: torch.dtype
) -> Training:
    """Training as a user of the method writes it."""
    trained = trained_parameters(model)
    if not trained:
        return Training(model, [], lambda: loss_of_frozen(model, ids), torch.Tensor.backward, lambda: None, None, None)
    adamw = torch.optim.AdamW(trained, lr=LEARNING_RATE)
    if way.startswith("zero"):
        import deepspeed

        settings = zero_settings(int(way.removeprefix("zero")), model, config.hidden_size, ranks, dtype)
        engine, optimizer, *_ = deepspeed.initialize(
            model=model, optimizer=adamw, model_parameters=trained, config=settings
        )
        return Training(model, trained, lambda: loss_of(engine, ids), engine.backward, engine.step, optimizer, adamw)
    wrapped = nn.parallel.DistributedDataParallel(model) if way == "ddp" else model

    def update() -> None:
        adamw.step()
        adamw.zero_grad()

    return Training(model, trained, lambda: loss_of(wrapped, ids), torch.Tensor.backward, update, adamw, adamw)


def zero_settings(stage: int, model: nn.Module, width: int, ranks: int, dtype: torch.dtype) -> dict[str, Any]:
    """The project's configs/zero2.json or zero3.json. "auto" is replaced as in SparseTrainer, or for peers as in
    transformers.Trainer.
    """
    settings = json.loads((Path(__file__).parents[1] / "configs" / f"zero{stage}.json").read_text())
    if isinstance(getattr(model, "sparsity", None), Sparsity):
        fit_buckets(settings, model)
    automatic = {
        "train_batch_size": ranks,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "reduce_bucket_size": width * width,
        "stage3_prefetch_bucket_size": int(0.9 * width * width),
        "stage3_param_persistence_threshold": 10 * width,
    }
    for section in (settings, settings["zero_optimization"]):
        section |= {key: automatic[key] for key, value in section.items() if value == "auto"}
    settings |= {"bf16": {"enabled": dtype == torch.bfloat16}, "fp16": {"enabled": False}}
    # All methods use the same optimizer
    return settings | {"zero_allow_untested_optimizer": True}


def step(training: Training) -> None:
    with Meter.mark("step"):
        with Meter.mark("forward"):
            loss = training.forward()
        with Meter.mark("backward"):
            training.backward(loss)
        del loss
        with Meter.mark("update"):
            training.update()


def seconds_of_update(training: Training) -> tuple[float, float]:
    """Returns: seconds of the optimizer's arithmetic, and of everything after backward, including communication."""
    own, whole = [], []
    started = [0.0]
    handles = []
    if training.inner:
        handles = [
            training.inner.register_step_pre_hook(lambda *_: started.__setitem__(0, time.perf_counter())),
            training.inner.register_step_post_hook(lambda *_: own.append(time.perf_counter() - started[0])),
        ]
    for _ in range(TIMED_STEPS):
        training.backward(training.forward())
        begun = time.perf_counter()
        training.update()
        whole.append(time.perf_counter() - begun)
    for handle in handles:
        handle.remove()
    return statistics.median(own or [0.0]), statistics.median(whole)


def holdings(
    training: Training, base: list[nn.Parameter], ids: torch.Tensor, live: int, older: set[int]
) -> dict[str, int]:
    """Bytes allocated between two steps, by purpose.

    Args: live: of everything; older: addresses of integer tensors that existed before.
    """
    of_base = {id(parameter) for parameter in base}
    own = _tensors_of([parameter for parameter in training.trained if id(parameter) not in of_base])
    weights = _tensors_of(base)
    state = optimizer_state_tensors(training.optimizer) if training.optimizer else []
    known = older | {t.untyped_storage().data_ptr() for t in [*weights, *own, *state, ids]}
    indices = [t for t in _living_indices() if t.untyped_storage().data_ptr() not in known]
    held = {
        "weights": bytes_of(weights),
        "trained": bytes_of(own),
        "optimizer": optimizer_bytes(training.optimizer) if training.optimizer else 0,
        "indices": bytes_of(indices),
        "originals": bytes_of(_originals(training.model)),
    }
    return held | {"other": live - sum(held.values())}


def _tensors_of(parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    """The tensors that a rank stores: of parameters that stage 3 partitions, its partitions."""
    return [getattr(parameter, "ds_tensor", parameter.data) for parameter in parameters]


def _living_indices() -> list[torch.Tensor]:
    tensors = (each for each in gc.get_objects() if issubclass(type(each), torch.Tensor))
    return [
        tensor
        for tensor in tensors
        if tensor.layout == torch.strided
        and tensor.dtype in (torch.int32, torch.int64)
        and tensor.dim() > 0
        and _has_values(tensor)
    ]


def _has_values(tensor: torch.Tensor) -> bool:
    """Whether it has memory. Tensors that torch.compile's traces have left do not."""
    try:
        tensor.untyped_storage().data_ptr()
    except RuntimeError:
        return False
    return True


def _originals(model: nn.Module) -> list[torch.Tensor]:
    """The pretrained values of the selected scalars, if the method stores them."""
    if hasattr(model, "original_chosen_params"):  # peft-sparta, whose `sparsity` is a number
        return list(model.original_chosen_params.values())
    return [weight.base for weight in model.sparsity.weights.values()] if hasattr(model, "sparsity") else []


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    dtype, ranks = getattr(torch, arguments.dtype), int(os.environ.get("WORLD_SIZE", "1"))
    config = llama_config(arguments.model)
    ids = torch.randint(config.vocab_size, (1, arguments.tokens), generator=torch.Generator().manual_seed(1))
    ids = ids.to(arguments.device)
    older = {tensor.untyped_storage().data_ptr() for tensor in _living_indices()}
    with Meter(arguments.device) as meter:
        model = llama(config, dtype, arguments.device)
        base = list(model.parameters())
        budget = Budget.of(model, TARGETS[arguments.targets], arguments.density)
        # The meter counts only allocations of this thread
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        model = METHODS[arguments.method](model, budget)
        torch.set_num_threads(threads)
        training = start(model, ids, arguments.way, config, ranks, dtype)
        scalars = sum(getattr(p, "ds_numel", p.numel()) for p in training.trained)
        step(training)
        gc.collect()
        grown = peak_of(lambda: step(training))[1]
        gc.collect()
    held = holdings(training, base, ids, meter.whole.last, older)
    whole, forward = meter.spans("step")[-1], meter.spans("forward")[-1]
    nodes = [span.transient for name in GRADIENT_NODES for span in meter.spans(name)]
    own, update = seconds_of_update(training)
    return held | {
        "scalars": scalars,
        "budget": budget.scalars,
        "activations": forward.last - forward.first,
        "transient": whole.peak - forward.last,
        "peak": whole.peak,
        "gradient_transient": max(nodes, default=None),
        "resident": grown,
        "update_seconds": update,
        "optimizer_seconds": own,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--way", choices=WAYS, default="plain")
    parser.add_argument("--model", choices=SHAPES, default="llama-120m")
    parser.add_argument("--targets", choices=TARGETS, default="all-linear")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rank = os.environ.get("RANK", "0")
    if arguments.device != "cpu":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if arguments.way != "plain":
        torch.distributed.init_process_group("gloo" if arguments.device == "cpu" else "nccl")
    figures = measure(arguments)
    (arguments.out / f"rank-{rank}.json").write_text(json.dumps(figures))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
