"""Where this rank keeps the trained scalars in float32 and what the optimizer knows of them.

Whatever the optimizer, its state is the same to the rest: fragments of named parameters, each with views of the value
and of the moments that can be read for a checkpoint and written when resuming.
    plain torch, DDP, DeepSpeed stage 0     every rank holds everything
    ZeRO stages 1 and 2, bfloat16           contiguous slices, in DeepSpeed's map from parameter to partition
    ZeRO stage 3                            a slice of every parameter
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparse_zero.errors import UserError
from sparse_zero.zero.parameters import is_partitioned, is_whole

VALUE = "value"


@dataclass(frozen=True)
class Fragment:
    """Scalars [start, start + count) of a flattened parameter, which lie in `holder` from `at` on."""

    name: str
    start: int
    count: int
    holder: torch.Tensor
    """The tensor that the optimizer updates, and that keys its state."""
    at: int


class Partition:
    """The trained scalars that this rank holds."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimizer: Any) -> None:
        """Args: parameters: the trained ones by name; optimizer: torch's or DeepSpeed's, not Accelerate's wrapper."""
        self._parameters, self._zero = parameters, optimizer
        self.optimizer = _innermost(optimizer)
        self.fragments = sorted(_fragments(parameters, optimizer), key=_order(parameters))
        self.is_replicated = not (
            hasattr(optimizer, "fp32_partitioned_groups_flat")
            or any(hasattr(parameter, "_hp_mapping") for parameter in parameters.values())
        )
        """Whether every rank holds every scalar."""

    def moments(self) -> list[str]:
        """Names of what the optimizer keeps for each scalar (exp_avg and exp_avg_sq of Adam).

        Raises UserError: it keeps something else, which cannot be cut into slices.
        """
        names: set[str] = set()
        for holder in self._holders():
            for name, value in self.optimizer.state.get(holder, {}).items():
                if name == "step" or value is None:
                    continue
                if torch.is_tensor(value) and value.numel() == holder.numel():
                    names.add(name)
                else:
                    raise UserError(
                        f"training.optim: {type(self.optimizer).__name__} keeps '{name}', which no checkpoint can cut "
                        "into the ranks' slices; use adamw_torch"
                    )
        return sorted(names)

    def view(self, fragment: Fragment, kind: str) -> torch.Tensor:
        """Args: kind: VALUE or one of `moments`.

        Returns: (count,), a view; zeros for a moment that is not there yet.
        """
        state = self.optimizer.state.get(fragment.holder, {})
        tensor = fragment.holder.detach() if kind == VALUE else state.get(kind)
        if tensor is None:
            return torch.zeros(fragment.count)
        return tensor.view(-1)[fragment.at : fragment.at + fragment.count]

    def steps(self) -> dict[str, int]:
        """Optimizer steps by parameter, for those that this rank holds something of."""
        groups = self._group_of_holder()
        steps = {}
        for fragment in self.fragments:
            state = self.optimizer.state.get(fragment.holder, {})
            # FusedAdam counts in the group
            steps[fragment.name] = int(state.get("step", groups[fragment.holder].get("step", 0)))
        return steps

    def learning_rates(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def prepare(self, moments: Iterable[str], steps: Mapping[str, int], learning_rates: list[float]) -> None:
        """Give the optimizer the state that it has after its first step, so that `view` can be written to."""
        step_of = {fragment.holder: steps[fragment.name] for fragment in self.fragments}
        # A holder of nothing but padding counts its steps too.
        for holder, group in self._group_of_holder().items():
            state, step = self.optimizer.state[holder], step_of.get(holder, max(steps.values()))
            for name in moments:
                if name not in state:
                    state[name] = torch.zeros_like(holder.detach())
            if isinstance(self.optimizer, torch.optim.Adam | torch.optim.AdamW):
                on_device = group.get("capturable") or group.get("fused")
                device = holder.device if on_device else "cpu"
                state["step"] = torch.tensor(float(step), device=device)
            elif moments:
                state["step"] = step
            if "step" in group:
                group["step"] = step
        if hasattr(self.optimizer, "ds_opt_adam"):
            _recount(self.optimizer, max(steps.values()))
        if len(learning_rates) == len(self.optimizer.param_groups):
            for group, rate in zip(self.optimizer.param_groups, learning_rates, strict=True):
                if torch.is_tensor(group["lr"]):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate

    @torch.no_grad()
    def publish(self) -> None:
        """Bring the model's own parameters up to the values written here. Collective under ZeRO."""
        zero = self._zero
        if hasattr(zero, "fp32_partitioned_groups_flat"):
            _publish_stage_3(zero, list(self._parameters.values()))
        elif hasattr(zero, "update_lp_params"):
            zero.update_lp_params()
        elif hasattr(zero, "fp32_groups_flat"):
            for group, flat in zip(zero.fp16_groups, zero.fp32_groups_flat, strict=True):
                at = 0
                for parameter in group:
                    parameter.copy_(flat[at : at + parameter.numel()].view_as(parameter))
                    at += parameter.numel()
        elif hasattr(zero, "fp32_groups"):
            for parameter, master in _pairs(zero):
                parameter.copy_(master)

    def _holders(self) -> list[torch.Tensor]:
        return list({id(fragment.holder): fragment.holder for fragment in self.fragments}.values())

    def _group_of_holder(self) -> dict[torch.Tensor, dict[str, Any]]:
        groups = {}
        zero = self._zero
        for group in self.optimizer.param_groups:
            groups |= dict.fromkeys(group["params"], group)
        # Stage 3 lends a partition to its group only for the time of a step.
        for group, partition in zip(
            self.optimizer.param_groups, _partitions_by_group(zero) if len(groups) == 0 else [], strict=False
        ):
            groups |= dict.fromkeys(partition, group)
        return groups


def _partitions_by_group(zero: Any) -> list[list[torch.Tensor]]:
    by_group: list[list[torch.Tensor]] = [[] for _ in zero.optimizer.param_groups]
    for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
        by_group[zero.sub_group_to_group_id[number]].append(flat)
    return by_group


def _innermost(optimizer: Any) -> torch.optim.Optimizer:
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _order(parameters: Mapping[str, nn.Parameter]) -> Any:
    place = {name: index for index, name in enumerate(parameters)}
    return lambda fragment: (place[fragment.name], fragment.start)


def _fragments(parameters: Mapping[str, nn.Parameter], zero: Any) -> Iterable[Fragment]:
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return _stage_3_fragments(parameters, zero)
    if any(hasattr(parameter, "_hp_mapping") for parameter in parameters.values()):
        return _mapped_fragments(parameters, zero)
    if hasattr(zero, "fp32_groups_flat"):
        return _flat_fragments(parameters, zero)
    if hasattr(zero, "fp32_groups"):
        masters = {id(p): m for p, m in _pairs(zero)}
        return [Fragment(name, 0, p.numel(), masters[id(p)], 0) for name, p in parameters.items()]
    if any(is_partitioned(parameter) for parameter in parameters.values()):
        raise UserError(f"{type(zero).__name__}: no checkpoint can be made of what it holds")
    return [Fragment(name, 0, p.numel(), p, 0) for name, p in parameters.items()]


def _stage_3_fragments(parameters: Mapping[str, nn.Parameter], zero: Any) -> Iterable[Fragment]:
    if zero.swap_optimizer:
        raise UserError(
            "training.deepspeed: offload_optimizer to nvme: checkpoints need the states in memory; use cpu"
        )
    for name, parameter in parameters.items():
        group, at, size = zero.grad_position[zero.get_param_id(parameter)]
        start = zero._get_param_partition_rank(parameter) * size
        # The last ranks' slices are padded
        count = min(size, parameter.ds_numel - start)
        if count > 0:
            yield Fragment(name, start, count, zero.fp32_partitioned_groups_flat[group], at)


def _mapped_fragments(parameters: Mapping[str, nn.Parameter], zero: Any) -> Iterable[Fragment]:
    flats = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_groups_flat_partition
    for name, parameter in parameters.items():
        mapping = parameter._hp_mapping
        if mapping is not None:
            flat = flats[mapping.param_group_index]
            address = mapping.hp_fragment_address
            yield Fragment(name, mapping.lp_fragment_address.start, address.numel, flat, address.start)


def _flat_fragments(parameters: Mapping[str, nn.Parameter], zero: Any) -> Iterable[Fragment]:
    names = {id(parameter): name for name, parameter in parameters.items()}
    for group, flat in zip(zero.fp16_groups, zero.fp32_groups_flat, strict=True):
        at = 0
        for parameter in group:
            yield Fragment(names[id(parameter)], 0, parameter.numel(), flat, at)
            at += parameter.numel()


def _pairs(zero: Any) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Parameters in half precision and their float32 originals."""
    for low, high in zip(zero.fp16_groups, zero.fp32_groups, strict=True):
        yield from zip(low, high, strict=True)


def _recount(optimizer: Any, steps: int) -> None:
    """DeepSpeedCPUAdam multiplies its powers of the betas up, step by step; another way to them rounds differently."""
    group, nothing = optimizer.param_groups[0], [torch.zeros(1) for _ in range(4)]
    for step in range(1, steps + 1):
        optimizer.ds_opt_adam.adam_update(optimizer.opt_id, step, 0.0, *group["betas"], 1.0, 0.0, True, *nothing)


def _publish_stage_3(zero: Any, parameters: list[nn.Parameter]) -> None:
    persistent = zero.persistent_parameters
    # Copies that are whole now, be it for good or by prefetching, hold the old values.
    whole = [p for p in {id(p): p for p in (*persistent, *parameters)}.values() if is_whole(p)]
    if whole:
        whole[0].partition(whole)
    for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
        if flat.numel():
            low = zero.fp16_partitioned_groups_flat[number]
            low.copy_(flat)
            pieces = zero.fp16_partitioned_groups[number]
            for piece, values in zip(pieces, zero.unflatten(low, pieces), strict=True):
                piece.data = values.data
    if persistent:
        persistent[0].all_gather(persistent)
