"""Sparse random adaptation of large models on DeepSpeed ZeRO.

    from sparse_zero import SparseConfig, sparsify, SparseTrainer

Names are loaded when first used, so that `sparse_zero.recipe.recipe` and the command line do not wait for torch.
"""

import importlib

_HOME = {
    "SparseConfig": "sparse_zero.selection.config",
    "UserError": "sparse_zero.errors",
    "sparsify": "sparse_zero.model.sparsify",
    "merge_and_unload": "sparse_zero.model.sparsify",
    "unload": "sparse_zero.model.sparsify",
    "disable_adapter": "sparse_zero.model.sparsify",
    "set_scale": "sparse_zero.model.sparsify",
    "combine_adapters": "sparse_zero.adapters.combine",
    "save_adapter": "sparse_zero.adapters.save_and_load",
    "load_adapter": "sparse_zero.adapters.save_and_load",
    "adapter_names": "sparse_zero.adapters.switching",
    "set_adapter": "sparse_zero.adapters.switching",
    "delete_adapter": "sparse_zero.adapters.switching",
    "merge_adapter": "sparse_zero.adapters.switching",
    "unmerge_adapter": "sparse_zero.adapters.switching",
    "SparseTrainer": "sparse_zero.training.trainer",
}

__all__ = list(_HOME)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'sparse_zero' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)
