"""Models and parameters in which scalars cannot be trained, and what to do instead.

Parameters that are not trained may be of any kind, except that their values must be there: the base model's
fingerprint is made of them.
"""

import logging
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from sparse_zero.errors import UserError
from sparse_zero.quantized.formats import quantized_layers
from sparse_zero.quantized.names import WHAT_WORKS
from sparse_zero.selection.targets import Target, all_targets
from sparse_zero.zero.parameters import is_partitioned

logger = logging.getLogger(__name__)

_QUANTIZED = {
    "TorchAOBaseTensor": "torchao",
    "QTensor": "quanto",
    "Params4bit": "bitsandbytes",
    "Int8Params": "bitsandbytes",
}
"""Classes of quantised parameters, or base classes of them, and the libraries that they are of."""

_PEFT_LAYERS = {"BaseTunerLayer", "AuxiliaryTrainingWrapper", "_BaseAdaptedAttention"}
"""Base classes of the layers by which PEFT replaces those of a model."""

_EXCLUDE = "exclude it (exclude_modules)"
_QUANTIZED_REMEDY = (
    f"such quantised weights cannot be trained; load the model in bfloat16 or in a kind that can "
    f"(model.quantization: {WHAT_WORKS}), or {_EXCLUDE}"
)
_UNSHARDED = "call sparsify on a model that is not sharded, and train it with DDP or DeepSpeed ZeRO"


class _Problem(NamedTuple):
    """Why a parameter cannot be trained."""

    what: str
    """What the parameter is."""
    remedy: str
    is_left_out: bool
    """Whether `targets: all` leaves it out. Otherwise it is an error."""

    def __str__(self) -> str:
        return f"{self.what}: {self.remedy}"


def check_supported(model: nn.Module, selected: Iterable[str], whole: Iterable[str]) -> None:
    """Check a model and the parameters that are to be trained, before anything is changed.

    Args:
        model: the base model without wrappers.
        selected: names of the parameters of which scalars are selected.
        whole: names of the parameters that are trained in full; those of buffers are ignored.

    Raises:
        UserError: one of them cannot be trained.
    """
    check_model(model)
    parameters = all_targets(model)
    for name in selected:
        if problem := _problem_of(parameters[name]):
            raise UserError(f"{name} {problem}")
    for name in whole:
        if name in parameters and (problem := _problem_of_values(parameters[name].parameter)):
            raise UserError(f"{name} {problem}")


def check_model(model: nn.Module) -> None:
    """Raise UserError if a model as a whole cannot be trained: it is sharded, a torch.jit script or without values."""
    for _, layer in quantized_layers(model):
        layer.check()
    if isinstance(model, torch.jit.ScriptModule):
        raise UserError(
            "the model is a torch.jit script, whose code cannot be changed: call sparsify before torch.jit"
        )
    for name, module in model.named_modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if kinds & {"FullyShardedDataParallel", "FSDPModule"}:
            raise UserError(f"{name or type(module).__name__} is sharded by FSDP: {_UNSHARDED}")
        # The only tuner layer without parameters is that of sparse_zero.peft
        if kinds & _PEFT_LAYERS and next(module.parameters(), None) is not None:
            raise UserError(
                f"{name} has an adapter of PEFT ({type(module).__name__}), which would be frozen: first call "
                "merge_and_unload() or unload() of the PEFT model, and use the model that it returns"
            )
    for name, target in all_targets(model).items():
        if isinstance(target.parameter, nn.parameter.UninitializedParameter):
            raise UserError(f"{name} has no shape yet (a lazy module): run one forward before sparsify")
        if target.parameter.is_meta and not is_partitioned(target.parameter):
            raise no_values(name, [module for module, _ in target.owners])


def no_values(name: str, owners: Iterable[nn.Module]) -> UserError:
    """The error for a parameter on the meta device, where it may be because Accelerate offloads one of its owners."""
    if any(_is_offloaded(module) for module in owners):
        return UserError(
            f"{name} is offloaded by Accelerate (device_map or cpu_offload), which hides its values: load the model "
            "without offloading; ZeRO stage 3 can train a model that does not fit one device"
        )
    return UserError(f"{name} is on the meta device, without values: load the weights before sparsify")


def only_supported(targets: Mapping[str, Target], leave_out: bool) -> dict[str, Target]:
    """The targets that can be trained.

    Args:
        targets: by parameter name.
        leave_out: leave out integer, complex and quantised parameters and those of scripts, with one warning.
            Otherwise, or if nothing remains, they are an error.

    Raises:
        UserError: a target cannot be trained.
    """
    problems = {name: found for name, target in targets.items() if (found := _problem_of(target))}
    for name, problem in problems.items():
        if not (leave_out and problem.is_left_out) or len(problems) == len(targets):
            raise UserError(f"sparse.targets: {name} {problem}")
    if problems:
        name = next(iter(problems))
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        logger.warning(
            "sparse.targets: all leaves out %s%s, which cannot be trained: it %s", name, more, problems[name].what
        )
    return {name: target for name, target in targets.items() if name not in problems}


def has_plain_values(parameter: torch.Tensor) -> bool:
    """Whether the operations on a parameter are those of an ordinary tensor."""
    return type(parameter).__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def _problem_of(target: Target) -> _Problem | None:
    if any(isinstance(module, torch.jit.ScriptModule) for module, _ in target.owners):
        return _Problem("is in a torch.jit script, whose code cannot be changed", _EXCLUDE, True)
    if target.quantized is not None:
        return _Problem("is quantized and shared by several layers", _EXCLUDE, True) if target.owners[1:] else None
    return _problem_of_values(target.parameter)


def _problem_of_values(parameter: torch.Tensor) -> _Problem | None:
    kind = type(parameter)
    kinds = {base.__name__ for base in kind.__mro__}
    dtype = str(parameter.dtype).removeprefix("torch.")
    if is_partitioned(parameter):
        pass  # DeepSpeed's parameters are ordinary ones with more attributes
    elif library := next((_QUANTIZED[name] for name in kinds if name in _QUANTIZED), None):
        return _Problem(f"is a {kind.__name__} of {library}", _QUANTIZED_REMEDY, True)
    elif "DTensor" in kinds:
        return _Problem("is a DTensor (FSDP2 or tensor parallelism)", _UNSHARDED, False)
    elif not has_plain_values(parameter) or not _has_plain_functions(kind):
        what = f"is a {kind.__name__}, a subclass of torch.Tensor with operations of its own"
        return _Problem(what, f"make it an ordinary parameter, or {_EXCLUDE}", False)
    elif parameter.is_inference():
        what = "was created under torch.inference_mode and can never be trained"
        return _Problem(what, "load the model outside of it", False)
    if parameter.is_complex():
        return _Problem(f"has dtype {dtype}", f"complex weights cannot be trained; {_EXCLUDE}", True)
    if not parameter.is_floating_point() or torch.finfo(parameter.dtype).bits < 16:
        return _Problem(f"has dtype {dtype}", _QUANTIZED_REMEDY, True)
    return None


def _has_plain_functions(kind: type[torch.Tensor]) -> bool:
    """Whether torch functions treat tensors of this class like ordinary ones. A subclass may just add attributes."""
    functions = [
        getattr(k.__torch_function__, "__func__", k.__torch_function__) for k in (kind, nn.Parameter, torch.Tensor)
    ]
    return functions[0] in functions[1:]


def _is_offloaded(module: nn.Module) -> bool:
    """Whether Accelerate keeps the parameters of the module elsewhere between forwards."""
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(part, "offload", False) for part in (hook, *getattr(hook, "hooks", ())))
