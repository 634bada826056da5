"""What libraries print when they are imported although nothing is wrong. Imports no torch."""

import logging


def silence_imports() -> None:
    """Keep torchao and bitsandbytes, which transformers and PEFT import, from warning of kernels that this machine
    does not have, and torch from warning of torchao's enumerations."""
    for name in ("torchao", "bitsandbytes.backends.cpu.ops", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
