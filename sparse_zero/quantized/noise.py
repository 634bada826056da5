"""What libraries print when they are imported although nothing is wrong. Imports no torch."""

import logging


def silence_imports() -> None:
    """Keep torchao, which transformers imports, from warning of kernels for GPUs on machines without one, and torch
    from warning of torchao's enumerations."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
