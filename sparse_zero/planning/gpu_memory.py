"""The memory of known accelerators. Imports no torch."""

from sparse_zero.errors import UserError, did_you_mean

GPU_MEMORY_GB = {
    "T4": 16,
    "L4": 24,
    "A10": 24,
    "RTX3090": 24,
    "RTX4090": 24,
    "V100-16": 16,
    "V100-32": 32,
    "A100-40": 40,
    "L40S": 48,
    "A100-80": 80,
    "H100": 80,
    "H200": 141,
    "MI300X": 192,
}
"""In units of 10^9 bytes, from the vendors' data sheets. The usable memory is this much or a little more."""


def gpu_memory_bytes(word: str) -> int:
    """The memory that --gpu-memory names, in bytes.

    Args: word: a number of GiB, or a name in GPU_MEMORY_GB in any case.

    Raises UserError: it is neither.
    """
    try:
        size = float(word)
    except ValueError:
        known = {name.lower(): gigabytes for name, gigabytes in GPU_MEMORY_GB.items()}
        if word.lower() in known:
            return known[word.lower()] * 10**9
        raise UserError(
            f"--gpu-memory {word}: unknown GPU{did_you_mean(word.upper(), GPU_MEMORY_GB)}; "
            f"give GiB, or one of {', '.join(GPU_MEMORY_GB)}"
        ) from None
    if not 0 < size < 2**30:
        raise UserError(f"--gpu-memory {word}: give GiB above 0, or the name of a GPU")
    return round(size * 2**30)
