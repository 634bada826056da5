"""A tensor by positions in its flattened form, whatever its memory layout."""

import torch


class FlatView:
    """Reads and writes scalars of a tensor. The memory of a layout such as channels_last is in another order."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self.flat = tensor.view(-1) if tensor.is_contiguous() else None
        """None for a layout such as channels_last, which has no flat view."""

    def read(self, positions: torch.Tensor) -> torch.Tensor:
        if self.flat is not None:
            return self.flat.index_select(0, positions)
        return self._tensor[torch.unravel_index(positions, self._tensor.shape)]

    def write(self, positions: torch.Tensor, values: torch.Tensor) -> None:
        if self.flat is not None:
            self.flat.index_copy_(0, positions, values)
        else:
            self._tensor.index_put_(torch.unravel_index(positions, self._tensor.shape), values)
