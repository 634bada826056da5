"""Prepares the environment of commands that import torch in this process."""

import os


def set_accelerator() -> None:
    """Prevents DeepSpeed's warning that there is no GPU, and errors of caches below a home that cannot be written."""
    from sparse_zero.ranks.caches import use_writable_caches

    use_writable_caches()
    from launcher.ways.devices import count_accelerators

    if count_accelerators() == 0:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
