"""What `sparse-zero inspect` shows of an adapter, read without the base model."""

from pathlib import Path
from typing import Any

from sparse_zero.adapter_files import adapter_bytes, read_adapter


def describe(directory: str | Path) -> dict[str, Any]:
    """Facts of an adapter and of each of its tensors. Raises UserError: see `read_adapter`."""
    adapter = read_adapter(directory)
    config = adapter.config
    return {
        "base_model": config.base_model_name_or_path,
        "revision": config.revision,
        "task": config.task,
        "dtype": config.dtype,
        "seed": config.sparse.seed,
        "density": config.trainable_parameters / config.total_parameters,
        "trainable_parameters": config.trainable_parameters,
        "total_parameters": config.total_parameters,
        "bytes": adapter_bytes(directory),
        "library_versions": config.library_versions,
        "tensors": [
            {
                "name": name,
                "shape": config.tensors[name].shape if name in config.tensors else list(values.shape),
                "trained": "selected" if name in config.tensors else "whole",
                "scalars": values.numel(),
                "norm": values.float().norm().item(),
            }
            for name, values in (adapter.deltas | adapter.whole).items()
        ],
    }
