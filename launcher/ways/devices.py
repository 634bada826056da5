"""The accelerators, cores and ports of this machine. torch is imported only if there is an accelerator to count."""

import os
import re
import socket
from pathlib import Path

from sparse_zero.errors import UserError

DEVICE_NODES = ("nvidia[0-9]*", "nvhost-*", "dxg", "kfd", "dri/renderD*", "accel*", "davinci[0-9]*")
"""NVIDIA (also Jetson and WSL), AMD, any GPU with a render node, the kernel's compute accelerators, Ascend."""


def count_accelerators(dev: Path = Path("/dev")) -> int:
    """The number of accelerators that torch can use; 0, without importing torch, if `dev` has no device node."""
    if not any(next(dev.glob(pattern), None) for pattern in DEVICE_NODES):
        return 0
    import torch

    return torch.accelerator.device_count()


def count_ranks(asked: int | str, accelerators: int) -> int:
    """The number of ranks to start on this machine.

    Args:
        asked: `launch.processes_per_node`, a number or "auto".

    Raises:
        UserError: the machine has accelerators, but fewer than ranks.
    """
    if asked == "auto":
        return max(1, accelerators)
    if 0 < accelerators < int(asked):
        raise UserError(
            f"launch.processes_per_node: {asked} ranks need as many accelerators, this machine has {accelerators}; "
            f"give {accelerators} or fewer, or train on the CPU with training.use_cpu=true"
        )
    return int(asked)


def visible_device_numbers(count: int) -> list[int] | None:
    """The first `count` devices of CUDA_VISIBLE_DEVICES; None if it is not set.

    Raises:
        UserError: it names devices by UUID, which DeepSpeed's runner does not accept.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    if not visible:
        return None
    if not re.fullmatch(r"\d+(\s*,\s*\d+)*", visible):
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={visible}: DeepSpeed's runner accepts device numbers only; "
            "give numbers, or start the ranks with launch.launcher=torchrun"
        )
    return [int(number) for number in visible.split(",")][:count]


def usable_cores() -> int:
    """The number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def port_is_free(port: int) -> bool:
    """Whether a server of the ranks could listen on `port`."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
