"""PEFT's own calls with sparse adapters: importing this package registers the method SPARSE_ZERO with PEFT.

    import sparse_zero.peft

    model = peft.get_peft_model(base, sparse_zero.peft.SparseZeroConfig(density=0.01))
    model.save_pretrained("adapter")
    model = peft.PeftModel.from_pretrained(base, "adapter")

It needs PEFT 0.21 or newer: pip install "sparse-zero[peft]".
"""

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

try:
    found = version("peft")
except PackageNotFoundError:
    raise ImportError('sparse_zero.peft needs PEFT: pip install "sparse-zero[peft]"') from None
if Version(found) < Version("0.21"):
    raise ImportError(f'sparse_zero.peft needs PEFT 0.21 or newer, not {found}: pip install "sparse-zero[peft]"')

from sparse_zero.peft.registration import register

register()

from sparse_zero.peft.config import SparseZeroConfig  # noqa: E402
from sparse_zero.peft.tuner import SparseZeroModel  # noqa: E402

__all__ = ["SparseZeroConfig", "SparseZeroModel"]
