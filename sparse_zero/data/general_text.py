"""The text on which the loss of a language model is measured before and after training: what it has forgotten."""

from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sparse_zero.errors import UserError
from sparse_zero.recipe.recipe import SHIPPED_TEXT

WINDOW = 512
"""Tokens of a piece of the text, if the examples may be as long."""

_SHIPPED = Path(__file__).with_name("texts") / "general.txt"


def text_pieces(file: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Dataset:
    """The tokens of a text in pieces of at most `WINDOW` and `max_length` tokens, as examples of a language model.

    Args:
        file: the recipe's `data.forgetting`.
        tokenizer: of the model.
        max_length: of the recipe's examples, in tokens.

    Returns: the columns `input_ids`, `labels` and `position_ids`; all tokens but the first of a piece have a loss.

    Raises UserError: the file cannot be read, or has fewer than two tokens.
    """
    path = _SHIPPED if file == SHIPPED_TEXT else Path(file)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.forgetting: {path}: cannot be read as text ({error})") from None
    tokens, length = tokenizer(text, verbose=False).input_ids, min(WINDOW, max_length or WINDOW)
    pieces = [tokens[start : start + length] for start in range(0, len(tokens), length)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    if not pieces:
        raise UserError(f"data.forgetting: {path}: has no two tokens; give a text of a few pages")
    positions = [[*range(len(piece))] for piece in pieces]
    return Dataset.from_dict({"input_ids": pieces, "labels": pieces, "position_ids": positions})
