"""Changed copies of the training texts: `data.augment` of a recipe."""

from random import Random
from typing import Any

from rpn.text import augment


def with_copies(
    batch: dict[str, list], indices: list[int], text: str, method: str, copies: int, seed: int
) -> dict[str, list]:
    """Each example followed by its copies with changed texts. A copy is a function of (seed, index of the example,
    number of the copy), so all ranks and a resumed run have the same.

    Args: batch, indices: as Dataset.map passes them. text: the column of the text.
    """
    repeated: dict[str, list[Any]] = {
        name: [value for value in values for _ in range(1 + copies)] for name, values in batch.items()
    }
    repeated[text] = [
        augment(value, method, Random(f"{seed} {index} {copy}")) if copy else value
        for value, index in zip(batch[text], indices, strict=True)
        for copy in range(1 + copies)
    ]
    return repeated
