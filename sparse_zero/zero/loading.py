"""Loading a model of which each rank needs all values, in a run with ZeRO stage 3."""

import contextlib
from collections.abc import Iterator

from transformers.integrations import deepspeed as integration


@contextlib.contextmanager
def not_partitioned() -> Iterator[None]:
    """Within it transformers builds and loads models as without ZeRO stage 3, at which it would partition them."""
    reference = integration._hf_deepspeed_config_weak_ref
    config = reference() if reference is not None else None
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            integration.set_hf_deepspeed_config(config)
