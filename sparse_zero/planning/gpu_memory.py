"""Memory of known accelerators. Imports no torch."""

from sparse_zero.errors import UserError, did_you_mean

CARDS_GB = {
    "T4": 16,
    "L4": 24,
    "A10": 24,
    "RTX3090": 24,
    "RTX4090": 24,
    "V100-16": 16,
    "V100-32": 32,
    "A100-40": 40,
    "L40S": 48,
    "A100-80": 80,
    "H100": 80,
    "H200": 141,
    "MI300X": 192,
}
"""GB of 10^9 bytes, as the vendors' data sheets have it; cards hold as much or a little more."""


def card_bytes(word: str) -> int:
    """Args: word: GiB, or a card's name. Raises UserError: neither."""
    try:
        size = float(word)
    except ValueError:
        known = {name.lower(): gigabytes for name, gigabytes in CARDS_GB.items()}
        if word.lower() in known:
            return known[word.lower()] * 10**9
        raise UserError(
            f"--gpu-memory {word}: no such card{did_you_mean(word.upper(), CARDS_GB)}; "
            f"give GiB, or one of {', '.join(CARDS_GB)}"
        ) from None
    if not 0 < size < 2**30:
        raise UserError(f"--gpu-memory {word}: give GiB above 0, or a card's name")
    return round(size * 2**30)
