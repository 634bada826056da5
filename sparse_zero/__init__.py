"""Sparse random adaptation of large models on DeepSpeed ZeRO.

    from sparse_zero import SparseConfig, sparsify, SparseTrainer

Names are imported on first use, so that reading a recipe and the command line do not import torch.
"""

import importlib

# Type checkers and editors treat this name as true. `typing` is not imported: it takes a third of the import time.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from sparse_zero.adapters.combine import combine_adapters as combine_adapters
    from sparse_zero.adapters.save_and_load import load_adapter as load_adapter
    from sparse_zero.adapters.save_and_load import save_adapter as save_adapter
    from sparse_zero.adapters.switching import adapter_names as adapter_names
    from sparse_zero.adapters.switching import delete_adapter as delete_adapter
    from sparse_zero.adapters.switching import merge_adapter as merge_adapter
    from sparse_zero.adapters.switching import set_adapter as set_adapter
    from sparse_zero.adapters.switching import unmerge_adapter as unmerge_adapter
    from sparse_zero.data.package import package_path as package_path
    from sparse_zero.errors import UserError as UserError
    from sparse_zero.model.sparse_model import refresh as refresh
    from sparse_zero.model.sparsify import disable_adapter as disable_adapter
    from sparse_zero.model.sparsify import merge_and_unload as merge_and_unload
    from sparse_zero.model.sparsify import set_scale as set_scale
    from sparse_zero.model.sparsify import sparsify as sparsify
    from sparse_zero.model.sparsify import unload as unload
    from sparse_zero.ranks.extension_locks import remove_abandoned_locks as remove_abandoned_locks
    from sparse_zero.selection.config import SparseConfig as SparseConfig
    from sparse_zero.training.trainer import SparseTrainer as SparseTrainer
    from sparse_zero.zero.parameters import fit_buckets as fit_buckets

_HOME = {
    "SparseConfig": "sparse_zero.selection.config",
    "UserError": "sparse_zero.errors",
    "sparsify": "sparse_zero.model.sparsify",
    "merge_and_unload": "sparse_zero.model.sparsify",
    "unload": "sparse_zero.model.sparsify",
    "disable_adapter": "sparse_zero.model.sparsify",
    "set_scale": "sparse_zero.model.sparsify",
    "refresh": "sparse_zero.model.sparse_model",
    "combine_adapters": "sparse_zero.adapters.combine",
    "save_adapter": "sparse_zero.adapters.save_and_load",
    "load_adapter": "sparse_zero.adapters.save_and_load",
    "adapter_names": "sparse_zero.adapters.switching",
    "set_adapter": "sparse_zero.adapters.switching",
    "delete_adapter": "sparse_zero.adapters.switching",
    "merge_adapter": "sparse_zero.adapters.switching",
    "unmerge_adapter": "sparse_zero.adapters.switching",
    "SparseTrainer": "sparse_zero.training.trainer",
    "fit_buckets": "sparse_zero.zero.parameters",
    "remove_abandoned_locks": "sparse_zero.ranks.extension_locks",
    "package_path": "sparse_zero.data.package",
}
"""The module of each public name. The imports above repeat it for type checkers and editors."""

__all__ = list(_HOME)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'sparse_zero' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)
