"""What the rest of the library needs to know of a quantised linear layer, whichever library made it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import nn

from sparse_zero.errors import UserError


class QuantizedLayer(ABC):
    """A linear layer whose weight (out, in) is packed. It is a view of the module: it keeps no state of its own."""

    name = "weight"
    """The attribute of the module that contains the packed weight."""
    is_subclassed = False
    """Whether the packed weight is a subclass of a tensor, which has few of its operations."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @classmethod
    @abstractmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether a module is a quantised layer of this format. It must not import the library."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """What the weight was quantised to, e.g. `nf4`, `nf4-double`, `int8`. Adapters store it."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """(out, in), also while ZeRO stage 3 partitions the packed weight."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype that the weight had before."""

    @abstractmethod
    def dequantized(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A new tensor (out, in) with the values that the layer's own product uses.

        The packed weight must be complete (ZeRO stage 3). No gradient is recorded.

        Args: dtype: None for `dtype`.
        """

    @property
    @abstractmethod
    def packed(self) -> torch.Tensor:
        """The packed weight as bytes, uint8 (bytes,), in the order in which it was packed: the same for any storage
        dtype."""

    @abstractmethod
    def statistics(self) -> Iterator[torch.Tensor]:
        """The tensors besides the packed weight that its values depend on, such as the scales of the blocks."""

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """The tensors of the packed weight in the module's state dict, by their names in it."""

    def is_equal(self, one: torch.Tensor, other: torch.Tensor) -> bool:
        """Whether two tensors of `state` are the same. Args: on any devices."""
        return one.shape == other.shape and torch.equal(one.to(other.device), other)

    @abstractmethod
    def identity(self) -> Iterator[torch.Tensor]:
        """Tensors that tell the quantised weight from others: integers, or real numbers that any device computes
        alike."""

    @abstractmethod
    def quantize(self, weight: torch.Tensor) -> nn.Module:
        """A new layer like this one, with its bias, of another weight.

        Args: weight: (out, in), real numbers.
        """

    @abstractmethod
    def product_is_dequantized(self, inputs: torch.Tensor) -> bool:
        """Whether the layer's own product for these inputs is the ordinary one with a dequantised copy of the weight,
        and does not round the inputs."""

    @abstractmethod
    def product_dtype(self, inputs: torch.Tensor) -> torch.dtype:
        """The dtype to which the layer's own product converts its inputs and its copy of the weight."""

    def check_forward(self) -> None:  # noqa: B027
        """Raise UserError before a forward if the packed weight no longer is what the layer takes it for."""

    def check(self) -> None:
        """Raise UserError if scalars of the layer cannot be trained as it is."""
        members = vars(self.module)
        if "forward" in members and "_old_forward" not in members:  # the latter: Accelerate's hook
            raise UserError(
                f"the forward of a quantised {type(self.module).__name__} was replaced, so that deltas would not be "
                "added to its weight: call sparsify or load_adapter before"
            )

    def convert_bias(self) -> None:  # noqa: B027
        """Convert the bias now if the layer does it in its first forward: scalars of it may be selected."""

    def forbid_repacking(self) -> None:  # noqa: B027 - most libraries do not repack
        """Make the layer keep its weight as it is packed now, if it would repack it when it is first used."""

    def allow_repacking(self) -> None:  # noqa: B027
        """Undo `forbid_repacking`."""

    @property
    def packed_bytes(self) -> int:
        """The size of the packed weight, complete, whether or not ZeRO stage 3 partitions it."""
        parameter = self.module._parameters[self.name]
        return getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()

    @property
    def statistics_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.statistics())

    def plain(self, weight: torch.Tensor) -> nn.Module:
        """The layer that the model had before it was quantised, with this weight.

        Args: weight: (out, in). It becomes the parameter, without a copy if possible.
        """
        bias = self.module._parameters.get("bias")
        rows, columns = weight.shape
        layer = nn.Linear(columns, rows, bias=bias is not None, device="meta", dtype=weight.dtype)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            layer.bias = bias
            bias.data = bias.data.to(weight.dtype)
        return layer.train(self.module.training)
