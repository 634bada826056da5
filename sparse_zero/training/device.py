"""The device of this process: its name and its peak memory."""

import platform
import resource

import torch


def peak_memory_bytes() -> int:
    """Peak memory of this process in bytes: accelerator memory if there is an accelerator, else resident memory."""
    if torch.accelerator.is_available():
        return torch.accelerator.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_name() -> str:
    """The name of the GPU, or the CPU architecture and the number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''} per process"
