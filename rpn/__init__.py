"""Random Position Noise (arXiv 2212.05961) and other noises on the embeddings of any Hugging Face model.

    handle = rpn.attach(model, rpn.RPNConfig(probability=0.1))
    ...  # every forward in training mode now has the noise
    handle.detach()

Names are imported when first used, so that `import rpn.config` does not import torch.
"""

import importlib

_HOME = {
    "RPNConfig": "rpn.config",
    "attach": "rpn.hooks",
    "Handle": "rpn.hooks",
    "run_passes": "rpn.objective",
    "Stream": "rpn.streams",
    "Groups": "rpn.streams",
}

__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'rpn' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)
