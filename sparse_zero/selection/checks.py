"""Checks of positions: that they are those of a selection, and a checksum of them."""

from collections.abc import Iterable, Iterator

import torch
import xxhash

from sparse_zero.errors import UserError
from sparse_zero.selection.rules import Selection


def checked_chunks(selection: Selection, chunks: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Check the positions of a selection, whoever draws or stores them, before anything is read or written at them.

    Args:
        chunks: the positions in chunks.

    Yields:
        the chunks; each one is checked before.

    Raises:
        UserError: the positions are not int64 (count,), strictly increasing, in the weight. A wrong count is found
            before a chunk exceeds it, or after the last chunk.
    """
    start, last = 0, -1
    for chunk in chunks:
        if chunk.dim() != 1 or chunk.dtype != torch.int64:
            raise UserError(f"{selection.name}: positions must be int64 (n,), not {chunk.dtype} {list(chunk.shape)}")
        start += chunk.numel()
        if start > selection.count:
            break
        if chunk.numel():
            # One transfer from an accelerator
            first, final, rises = torch.stack([chunk[0], chunk[-1], (chunk[1:] > chunk[:-1]).all().long()]).tolist()
            if not (last < first and rises and final < selection.numel):
                raise UserError(
                    f"{selection.name}: positions must be strictly increasing, in 0 to {selection.numel - 1}"
                )
            last = final
        yield chunk
    if start != selection.count:
        raise UserError(
            f"{selection.name}: {'more' if start > selection.count else 'less'} than {selection.count} positions"
        )


class Checksum:
    """A checksum (XXH3) of the bytes of tensors, one after the other.

    The checksum of positions shows whether a rule still draws the same positions.
    """

    def __init__(self) -> None:
        self._digest = xxhash.xxh3_64()

    def update(self, tensor: torch.Tensor) -> None:
        """Add the bytes of a tensor."""
        self._digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())

    def hexdigest(self) -> str:
        """The checksum of all tensors so far: 16 hexadecimal digits."""
        return self._digest.hexdigest()


def checksum(tensor: torch.Tensor) -> str:
    """The checksum of one tensor."""
    whole = Checksum()
    for chunk in tensor.flatten().split(1 << 18):
        whole.update(chunk)
    return whole.hexdigest()
