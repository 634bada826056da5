"""What cannot be done with a sparse model: it raises an error instead of being silently wrong."""

from typing import NoReturn

import torch

from sparse_zero.errors import UserError


def refuse_second_derivatives(name: str) -> None:
    """Raise UserError in a backward with create_graph=True: its result would not depend on the deltas.

    Args: name: of the parameter.
    """
    if torch.is_grad_enabled():
        raise UserError(
            f"{name}: second derivatives of a sparse model are not supported: call backward or torch.autograd.grad "
            "without create_graph=True"
        )


def refuse_replacement(name: str) -> NoReturn:
    """Raise UserError for a weight that is removed, as torch.nn.utils.parametrize does.

    Args: name: of the parameter.
    """
    raise UserError(f"{name}: a sparse weight cannot be removed or parametrized; do it before sparsify")


def refuse_transforms(name: str) -> None:
    """Raise UserError within torch.func.grad, vmap and the like, which do not see the gradient of a delta.

    Args: name: of the parameter or the model.
    """
    if torch._C._functorch.maybe_current_level() is not None:
        raise UserError(
            f"{name}: the deltas of a sparse model cannot be trained within torch.func (grad, vmap, jvp ...); use "
            "torch.autograd, or call merge_and_unload(model) first"
        )
