"""Packing: several examples in one sequence, and the collator for such sequences."""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch.nn.utils.rnn import pad_sequence

from sparse_zero.data.tokenization import IGNORED, Batch
from sparse_zero.errors import UserError


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Distribute examples among sequences of at most `max_length` tokens, by best-fit decreasing.

    Examples are placed from the longest to the shortest, each in the sequence where it leaves the least free space.

    Args:
        lengths: tokens of each example, at most `max_length`.
        max_length: tokens of a sequence.

    Returns: for each sequence the sorted indices of its examples.
    """
    sequences: list[list[int]] = []
    by_free_space: dict[int, list[list[int]]] = {}
    spaces: list[int] = []  # sorted keys of by_free_space that have sequences
    for example in sorted(range(len(lengths)), key=lambda example: -lengths[example]):
        smallest = bisect_left(spaces, lengths[example])
        if smallest == len(spaces):
            space, sequence = max_length, []
            sequences.append(sequence)
        else:
            space = spaces[smallest]
            sequence = by_free_space[space].pop()
            if not by_free_space[space]:
                del spaces[smallest]
        sequence.append(example)
        space -= lengths[example]
        if not by_free_space.setdefault(space, []):
            insort(spaces, space)
        by_free_space[space].append(sequence)
    return sorted(sorted(sequence) for sequence in sequences)


def pack_batch(batch: Batch, max_length: int) -> Batch:
    """Join tokenised examples into sequences of at most `max_length` tokens.

    `position_ids` restart at 0 with each example. The first label of each example is -100, because it would be
    predicted from the example before.
    """
    packed: Batch = {"input_ids": [], "labels": [], "position_ids": []}
    for examples in pack([len(ids) for ids in batch["input_ids"]], max_length):
        tokens = [batch["input_ids"][example] for example in examples]
        labels = [[IGNORED, *batch["labels"][example][1:]] for example in examples]
        packed["input_ids"].append(list(chain.from_iterable(tokens)))
        packed["labels"].append(list(chain.from_iterable(labels)))
        packed["position_ids"].append([position for ids in tokens for position in range(len(ids))])
    return packed


@dataclass(frozen=True)
class PackedCollator:
    """A collator for packed sequences: int64 `input_ids`, `labels` and `position_ids`, each (batch, longest).

    There is no attention mask: transformers detects packed examples by the restarts of `position_ids`, but only
    without a mask and without a cache. Padding tokens all have position 0, so each counts as a separate example.
    """

    pad_token_id: int

    def __call__(self, features: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        padding = {"input_ids": self.pad_token_id, "labels": IGNORED, "position_ids": 0}
        return {
            column: pad_sequence(
                [torch.tensor(row[column]) for row in features], batch_first=True, padding_value=value
            )
            for column, value in padding.items()
        }


def check_packing(attn_implementation: str, batch_size: int) -> None:
    """Raise UserError if packed examples would attend to each other in batches of this size.

    With flash attention, transformers detects packed examples only in batches of one sequence (`_is_packed_sequence`).
    """
    if "flash" in attn_implementation and batch_size > 1:
        raise UserError(
            f"data.packing: {attn_implementation} separates packed examples only in batches of one sequence, not "
            f"{batch_size}; set model.attn_implementation to sdpa, or set the batch sizes to 1 and increase "
            "data.max_length"
        )


Forward = Callable[[dict[str, torch.Tensor]], torch.Tensor]

_LENGTHS = (5, 7, 6)
"""Tokens of the examples of a probe."""


@torch.no_grad()
def leak_between_examples(forward: Forward, vocabulary: int, rows: int = 1) -> float:
    """How much packed examples see of each other.

    Args:
        forward: gives the logits (rows, tokens, ...) of a batch of `PackedCollator`, without dropout.
        vocabulary: the number of token ids.
        rows: sequences in the batch.

    Returns: the largest change of the logits of the second and third example when the first changes, relative to the
        largest logit. It is 0 up to rounding if examples do not see each other.
    """
    generator = torch.Generator().manual_seed(0)
    examples = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in _LENGTHS]
    other = [(id + 1 + vocabulary // 2) % vocabulary for id in examples[0]]
    logits = [
        forward(_probe([first, *examples[1:]], rows))[:, _LENGTHS[0] :].float() for first in (examples[0], other)
    ]
    return ((logits[0] - logits[1]).abs().max() / logits[0].abs().max().clamp(min=1e-30)).item()


def _probe(examples: list[list[int]], rows: int) -> dict[str, torch.Tensor]:
    packed = {
        "input_ids": list(chain.from_iterable(examples)),
        "labels": [IGNORED] * sum(_LENGTHS),
        "position_ids": [position for example in examples for position in range(len(example))],
    }
    batch = PackedCollator(0)([packed] * rows)
    del batch["labels"]
    return batch
