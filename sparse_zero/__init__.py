"""Sparse random adaptation of large models on DeepSpeed ZeRO.

    from sparse_zero import SparseConfig, sparsify, SparseTrainer

Names are loaded when first used, so that `sparse_zero.recipe` and the command line do not wait for torch.
"""

import importlib

_HOME = {
    "SparseConfig": "sparse_zero.config",
    "UserError": "sparse_zero.errors",
    "sparsify": "sparse_zero.model",
    "merge_and_unload": "sparse_zero.model",
    "unload": "sparse_zero.model",
    "disable_adapter": "sparse_zero.model",
    "set_scale": "sparse_zero.model",
    "combine_adapters": "sparse_zero.combine",
    "save_adapter": "sparse_zero.adapter",
    "load_adapter": "sparse_zero.adapter",
    "adapter_names": "sparse_zero.switching",
    "set_adapter": "sparse_zero.switching",
    "delete_adapter": "sparse_zero.switching",
    "merge_adapter": "sparse_zero.switching",
    "unmerge_adapter": "sparse_zero.switching",
    "SparseTrainer": "sparse_zero.trainer",
}

__all__ = list(_HOME)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'sparse_zero' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)
