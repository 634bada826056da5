"""What DeepSpeed ZeRO does to parameters, behind a few functions that also work without it."""

import contextlib
import platform
import resource
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO stage 3 holds this parameter in pieces (it is whole only while gathered)."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape that the parameter has when whole."""
    return parameter.ds_shape if is_partitioned(parameter) else parameter.shape


def is_whole(parameter: nn.Parameter) -> bool:
    """Whether the parameter's values are all here now: always, but for stage 3 outside of `gathered` and a forward."""
    return not is_partitioned(parameter) or parameter.numel() == parameter.ds_numel


def full_numel(parameter: nn.Parameter) -> int:
    return full_shape(parameter).numel()


@contextlib.contextmanager
def gathered(parameters: Iterable[nn.Parameter], write: bool = False) -> Iterator[None]:
    """Within this block the parameters are whole, on every rank. A collective call under ZeRO stage 3.

    Args: write: keep what rank 0 writes into them; without it changes are lost when the block ends.
    """
    partitioned = [p for p in parameters if is_partitioned(p)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if write else None):
        yield


def settle(model: nn.Module) -> None:
    """Wait for what stage 3 has prefetched for a forward that never came. Call it before `gathered`.

    After an evaluation some parameters are still in flight, and DeepSpeed asserts when they are to be partitioned.
    """
    prefetched = getattr(model, "ds_inflight_param_registry", {})
    for parameter in list(prefetched):
        prefetched.pop(parameter).wait()


def let_leaf_inputs_have_gradients(model: nn.Module) -> list[RemovableHandle]:
    """Hooks for the modules that stage 3 treats as one (its leaf modules: the blocks of a mixture of experts).

    DeepSpeed reduces their gradients in a full backward hook, which torch runs as soon as the inputs have theirs.
    Below the first trained layer no input needs one: the hook would run before the parameters have their gradients.
    """
    from deepspeed.utils import get_z3_leaf_modules

    return [module.register_forward_pre_hook(_require_gradients) for module in get_z3_leaf_modules(model)]


def _require_gradients(module: nn.Module, inputs: tuple) -> tuple:
    if not torch.is_grad_enabled() or any(torch.is_tensor(x) and x.requires_grad for x in inputs):
        return inputs
    return tuple(x.detach().requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs)


def stage_of(engine: Any) -> int:
    """The ZeRO stage of a DeepSpeed engine; 0 where there is no engine."""
    return engine.zero_optimization_stage() if engine is not None else 0


BUCKET_SCALARS = 2**24
"""Of the largest bucket: 32 MiB in half precision keep any link busy, and the next one fills while they are sent."""


def fitted_bucket(trained: int) -> int:
    """The bucket's scalars where so many are trained."""
    return min(trained, BUCKET_SCALARS)


def fit_buckets(config: dict[str, Any], model: nn.Module) -> None:
    """Make DeepSpeed's gradient buckets no larger than what `model` trains, where its configuration leaves that open.

    Every rank allocates `zero_optimization.reduce_bucket_size` scalars, twice with `overlap_comm`: half a billion if
    there is no such key, and the square of the hidden size where Accelerate or the Trainer has replaced "auto".
    SparseTrainer calls this; whoever calls deepspeed.initialize calls it before. In place; a number stays.
    """
    zero = config.get("zero_optimization")
    if isinstance(zero, dict) and zero.get("reduce_bucket_size", "auto") == "auto":
        trained = sum(full_numel(parameter) for parameter in model.parameters() if parameter.requires_grad)
        zero["reduce_bucket_size"] = fitted_bucket(trained)


def optimizer_state_tensors(optimizer: Any) -> list[torch.Tensor]:
    """What this rank holds for the optimizer: its moments, and under DeepSpeed its float32 partition.

    Args: optimizer: torch's, DeepSpeed's, or either inside Accelerate's wrapper, after its first step.
    """
    tensors = []
    while True:
        # Stages 1 and 2; stage 3; bfloat16 without partitions
        for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition"):
            tensors += getattr(optimizer, name, [])
        # Stage 0 in half precision
        for group in getattr(optimizer, "fp32_groups", []):
            tensors += group
        if not hasattr(optimizer, "optimizer"):
            break
        optimizer = optimizer.optimizer
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    # Adam counts its steps in a tensor of no dimension
    return list({id(tensor): tensor for tensor in tensors + states if tensor.dim() > 0}.values())


def optimizer_bytes(optimizer: Any) -> int:
    """Bytes of this rank's optimizer state: 12 x trainable / ranks under ZeRO, up to padding."""
    return sum(tensor.numel() * tensor.element_size() for tensor in optimizer_state_tensors(optimizer))


def peak_memory_bytes() -> int:
    """This process's peak so far: of the accelerator where there is one, else resident."""
    if torch.accelerator.is_available():
        return torch.accelerator.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''} per process"
