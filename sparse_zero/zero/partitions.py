"""This rank's partition of the trained scalars: float32 values and optimizer states, for checkpoints.

All optimizers present the same interface: fragments of named parameters. Each fragment has a view of its values and of
its moments, which is read to save a checkpoint and written to resume from one.
    plain torch, DDP, DeepSpeed stage 0     every rank holds all scalars
    ZeRO stages 1 and 2, bfloat16           contiguous slices, described by DeepSpeed's parameter-to-partition mapping
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
    """Scalars [start, start + count) of a flattened parameter, stored in `master` at `offset`."""

    name: str
    start: int
    count: int
    master: torch.Tensor
    """The float32 tensor that the optimizer updates: the key of its state dictionary."""
    offset: int


class Partition:
    """The trained scalars of this rank, with their optimizer states."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimizer: Any) -> None:
        """Find this rank's fragments.

        Args:
            parameters: the trained parameters by name.
            optimizer: a torch or DeepSpeed optimizer, not Accelerate's wrapper of one.

        Raises:
            UserError: no checkpoint can be made of this optimizer's state.
        """
        self._parameters, self._zero = parameters, optimizer
        self.optimizer = _innermost(optimizer)
        self.fragments = sorted(_fragments(parameters, optimizer), key=_order(parameters))
        self.is_replicated = not (
            hasattr(optimizer, "fp32_partitioned_groups_flat")
            or any(hasattr(parameter, "_hp_mapping") for parameter in parameters.values())
        )
        """Whether every rank holds all scalars."""

    def moments(self) -> list[str]:
        """Names of the optimizer's states that have one value per scalar (exp_avg and exp_avg_sq of Adam).

        Raises:
            UserError: the optimizer has another kind of state, which cannot be partitioned.
        """
        names: set[str] = set()
        for master in self._masters():
            for name, value in self.optimizer.state.get(master, {}).items():
                if name == "step" or value is None:
                    continue
                if torch.is_tensor(value) and value.numel() == master.numel():
                    names.add(name)
                else:
                    raise UserError(
                        f"training.optim: {type(self.optimizer).__name__} has the state '{name}', which a sharded "
                        "checkpoint cannot store; use adamw_torch"
                    )
        return sorted(names)

    def view(self, fragment: Fragment, kind: str) -> torch.Tensor:
        """The values or a moment of a fragment.

        Args:
            kind: VALUE or one of `moments()`.

        Returns:
            A view of shape (count,). For a moment that does not exist yet: zeros.
        """
        state = self.optimizer.state.get(fragment.master, {})
        tensor = fragment.master.detach() if kind == VALUE else state.get(kind)
        if tensor is None:
            return torch.zeros(fragment.count)
        return tensor.view(-1)[fragment.offset : fragment.offset + fragment.count]

    def steps(self) -> dict[str, int]:
        """Number of optimizer steps by parameter, for the parameters that have a fragment on this rank."""
        groups = self._group_of_master()
        steps = {}
        for fragment in self.fragments:
            state = self.optimizer.state.get(fragment.master, {})
            # FusedAdam counts its steps in the parameter group
            steps[fragment.name] = int(state.get("step", groups[fragment.master].get("step", 0)))
        return steps

    def learning_rates(self) -> list[float]:
        """The learning rate of each parameter group."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def initialize_state(self, moments: Iterable[str], steps: Mapping[str, int], learning_rates: list[float]) -> None:
        """Create the optimizer states that the first step would create, so that `view` can be written to.

        Args:
            moments: names of the states with one value per scalar.
            steps: number of optimizer steps by parameter.
            learning_rates: one for each parameter group; ignored if their number differs.
        """
        step_of = {fragment.master: steps[fragment.name] for fragment in self.fragments}
        # A master tensor that contains only padding counts its steps, too.
        for master, group in self._group_of_master().items():
            state, step = self.optimizer.state[master], step_of.get(master, max(steps.values()))
            for name in moments:
                if name not in state:
                    state[name] = torch.zeros_like(master.detach())
            if isinstance(self.optimizer, torch.optim.Adam | torch.optim.AdamW):
                on_device = group.get("capturable") or group.get("fused")
                device = master.device if on_device else "cpu"
                state["step"] = torch.tensor(float(step), device=device)
            elif moments:
                state["step"] = step
            if "step" in group:
                group["step"] = step
        if hasattr(self.optimizer, "ds_opt_adam"):
            _replay_cpu_adam_steps(self.optimizer, max(steps.values()))
        self.set_learning_rates(learning_rates)

    def set_learning_rates(self, rates: list[float]) -> None:
        """Args: rates: one for each parameter group; ignored if their number differs."""
        if len(rates) == len(self.optimizer.param_groups):
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                if torch.is_tensor(group["lr"]):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate

    @torch.no_grad()
    def update_model(self) -> None:
        """Copy the float32 values to the model's parameters. Collective under ZeRO."""
        zero = self._zero
        if hasattr(zero, "fp32_partitioned_groups_flat"):
            _update_model_at_stage_3(zero, list(self._parameters.values()))
        elif hasattr(zero, "update_lp_params"):
            zero.update_lp_params()
        elif hasattr(zero, "fp32_groups_flat"):
            for group, flat in zip(zero.fp16_groups, zero.fp32_groups_flat, strict=True):
                offset = 0
                for parameter in group:
                    parameter.copy_(flat[offset : offset + parameter.numel()].view_as(parameter))
                    offset += parameter.numel()
        elif hasattr(zero, "fp32_groups"):
            for parameter, master in _parameters_with_masters(zero):
                parameter.copy_(master)

    def _masters(self) -> list[torch.Tensor]:
        return list({id(fragment.master): fragment.master for fragment in self.fragments}.values())

    def _group_of_master(self) -> dict[torch.Tensor, dict[str, Any]]:
        groups = {}
        zero = self._zero
        for group in self.optimizer.param_groups:
            groups |= dict.fromkeys(group["params"], group)
        # At stage 3 a parameter group contains its partition only during a step.
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
    position = {name: index for index, name in enumerate(parameters)}
    return lambda fragment: (position[fragment.name], fragment.start)


def _fragments(parameters: Mapping[str, nn.Parameter], zero: Any) -> Iterable[Fragment]:
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return _stage_3_fragments(parameters, zero)
    if any(hasattr(parameter, "_hp_mapping") for parameter in parameters.values()):
        return _mapped_fragments(parameters, zero)
    if hasattr(zero, "fp32_groups_flat"):
        return _flat_fragments(parameters, zero)
    if hasattr(zero, "fp32_groups"):
        masters = {id(p): m for p, m in _parameters_with_masters(zero)}
        return [Fragment(name, 0, p.numel(), masters[id(p)], 0) for name, p in parameters.items()]
    if any(is_partitioned(parameter) for parameter in parameters.values()):
        raise UserError(f"{type(zero).__name__}: checkpoints of this ZeRO optimizer are not supported")
    return [Fragment(name, 0, p.numel(), p, 0) for name, p in parameters.items()]


def _stage_3_fragments(parameters: Mapping[str, nn.Parameter], zero: Any) -> Iterable[Fragment]:
    if zero.swap_optimizer:
        raise UserError(
            "training.deepspeed: offload_optimizer.device: nvme: checkpoints need the optimizer states in memory; "
            "use device: cpu"
        )
    for name, parameter in parameters.items():
        group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
        start = zero._get_param_partition_rank(parameter) * size
        # The slices of the last ranks may be padded
        count = min(size, parameter.ds_numel - start)
        if count > 0:
            yield Fragment(name, start, count, zero.fp32_partitioned_groups_flat[group], offset)


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
        offset = 0
        for parameter in group:
            yield Fragment(names[id(parameter)], 0, parameter.numel(), flat, offset)
            offset += parameter.numel()


def _parameters_with_masters(zero: Any) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Each half-precision parameter with its float32 master copy."""
    for low, high in zip(zero.fp16_groups, zero.fp32_groups, strict=True):
        yield from zip(low, high, strict=True)


def _replay_cpu_adam_steps(optimizer: Any, steps: int) -> None:
    """Set the step count of DeepSpeedCPUAdam by running `steps` empty updates.

    It computes the powers of its betas by one multiplication per step; any other way to compute them rounds
    differently.
    """
    group, nothing = optimizer.param_groups[0], [torch.zeros(1) for _ in range(4)]
    for step in range(1, steps + 1):
        optimizer.ds_opt_adam.adam_update(optimizer.opt_id, step, 0.0, *group["betas"], 1.0, 0.0, True, *nothing)


def _update_model_at_stage_3(zero: Any, parameters: list[nn.Parameter]) -> None:
    persistent = zero.persistent_parameters
    # Parameters that are complete now (persistent or prefetched ones) have the old values.
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
