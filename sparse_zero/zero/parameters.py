"""Helpers for parameters that DeepSpeed ZeRO may partition: gathering, gradient buckets, the optimizer's state.

They work on ordinary parameters, too.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO stage 3 partitions this parameter, so that it is complete only while gathered."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of the complete parameter, whether or not it is gathered now."""
    return parameter.ds_shape if is_partitioned(parameter) else parameter.shape


def is_whole(parameter: nn.Parameter) -> bool:
    """Whether all values of the parameter are on this rank now.

    This can be false only under ZeRO stage 3, outside `gathered` and the forward of the parameter's module.
    """
    return not is_partitioned(parameter) or parameter.numel() == parameter.ds_numel


def full_numel(parameter: nn.Parameter) -> int:
    """The number of scalars of the complete parameter, whether or not it is gathered now."""
    return full_shape(parameter).numel()


@contextlib.contextmanager
def gathered(parameters: Iterable[nn.Parameter], write: bool = False) -> Iterator[None]:
    """Gather the parameters on every rank for the duration of the block. Collective under ZeRO stage 3.

    Args:
        parameters: the parameters to gather. Those that stage 3 does not partition are left alone.
        write: keep the changes that rank 0 makes to partitioned parameters. Otherwise they are lost at the end.
    """
    partitioned = [p for p in parameters if is_partitioned(p)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if write else None):
        yield


def wait_for_prefetch(model: nn.Module) -> None:
    """Wait for parameters that ZeRO stage 3 has prefetched for a forward that did not run. Call it before `gathered`.

    After an evaluation some parameters are still in flight, and DeepSpeed raises an assertion when it partitions them.

    Args: model: that of which DeepSpeed made its engine, since it knows what is in flight.
    """
    prefetched = getattr(model, "ds_inflight_param_registry", {})
    for parameter in list(prefetched):
        prefetched.pop(parameter).wait()


def require_grad_on_leaf_inputs(model: nn.Module) -> list[RemovableHandle]:
    """Make the inputs of ZeRO stage 3's leaf modules (mixture-of-experts blocks) require a gradient.

    DeepSpeed reduces the gradients of a leaf module in a full backward hook, which torch runs as soon as the gradients
    of the module's inputs are ready. Before the first trained layer no input requires a gradient, so the hook would
    run before the gradients of the parameters exist.

    Returns:
        The handles of the forward pre-hooks, one for each leaf module.
    """
    from deepspeed.utils import get_z3_leaf_modules

    return [module.register_forward_pre_hook(_require_gradients) for module in get_z3_leaf_modules(model)]


def _require_gradients(module: nn.Module, inputs: tuple) -> tuple:
    if not torch.is_grad_enabled() or any(torch.is_tensor(x) and x.requires_grad for x in inputs):
        return inputs
    return tuple(x.detach().requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs)


def zero_stage(engine: Any) -> int:
    """The ZeRO stage of a DeepSpeed engine; 0 if `engine` is None."""
    return engine.zero_optimization_stage() if engine is not None else 0


MAX_BUCKET_SCALARS = 2**24
"""Size of the largest gradient bucket. 32 MiB in half precision use the full bandwidth of any link, and the next
bucket fills while this one is sent."""


def bucket_size(trained: int) -> int:
    """The size of a gradient bucket, in scalars, for a model with `trained` trainable scalars."""
    return min(trained, MAX_BUCKET_SCALARS)


def fit_buckets(config: dict[str, Any], model: nn.Module) -> None:
    """Set `zero_optimization.reduce_bucket_size`, if it is absent or "auto", to the number of trainable scalars.

    It is at most `MAX_BUCKET_SCALARS`. Every rank allocates `reduce_bucket_size` scalars, twice that with
    `overlap_comm`. DeepSpeed's default is half a billion; Accelerate and the Trainer replace "auto" with the square of
    the hidden size. `SparseTrainer` calls this function. Call it yourself before `deepspeed.initialize`.

    Args:
        config: the DeepSpeed configuration, changed in place. A number that it already sets is kept.
        model: the model whose trainable parameters are counted.
    """
    zero = config.get("zero_optimization")
    if isinstance(zero, dict) and zero.get("reduce_bucket_size", "auto") == "auto":
        trained = sum(full_numel(parameter) for parameter in model.parameters() if parameter.requires_grad)
        zero["reduce_bucket_size"] = bucket_size(trained)


def optimizer_state_tensors(optimizer: Any) -> list[torch.Tensor]:
    """The tensors of this rank's optimizer state: the moments and, under DeepSpeed, the float32 master weights.

    Args:
        optimizer: a torch or DeepSpeed optimizer, or Accelerate's wrapper of one, after its first step.
    """
    tensors = []
    while True:
        # ZeRO stages 1 and 2; stage 3; bfloat16 without partitions
        for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition"):
            tensors += getattr(optimizer, name, [])
        # Stage 0 in half precision
        for group in getattr(optimizer, "fp32_groups", []):
            tensors += group
        if not hasattr(optimizer, "optimizer"):
            break
        optimizer = optimizer.optimizer
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    # Adam counts its steps in a 0-dimensional tensor
    return list({id(tensor): tensor for tensor in tensors + states if tensor.dim() > 0}.values())


def optimizer_bytes(optimizer: Any) -> int:
    """Size of this rank's optimizer state in bytes: 12 * trainable / world size under ZeRO, plus padding."""
    return sum(tensor.numel() * tensor.element_size() for tensor in optimizer_state_tensors(optimizer))
