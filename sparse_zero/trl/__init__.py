"""TRL's trainers with this package's checkpoints, exact resume and adapters: SFT, DPO, reward models, GRPO, RLOO.

    from sparse_zero.trl import SparseDPOTrainer

Needs the extra `trl`. It is imported only by who names it. Others import from `build`.
"""

import importlib

__all__ = ["SparseDPOTrainer", "SparseGRPOTrainer", "SparseRLOOTrainer", "SparseRewardTrainer", "SparseSFTTrainer"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sparse_zero.trl.trainers import SparseDPOTrainer as SparseDPOTrainer
    from sparse_zero.trl.trainers import SparseGRPOTrainer as SparseGRPOTrainer
    from sparse_zero.trl.trainers import SparseRewardTrainer as SparseRewardTrainer
    from sparse_zero.trl.trainers import SparseRLOOTrainer as SparseRLOOTrainer
    from sparse_zero.trl.trainers import SparseSFTTrainer as SparseSFTTrainer


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module 'sparse_zero.trl' has no attribute '{name}'")
    return getattr(importlib.import_module("sparse_zero.trl.trainers"), name)
