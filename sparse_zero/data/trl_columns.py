"""Examples for TRL's trainers, which tokenise them themselves: the columns have TRL's names."""

import logging

from datasets import Dataset

from sparse_zero.data.columns import check_columns, without_incomplete
from sparse_zero.data.splits import load_splits
from sparse_zero.errors import UserError
from sparse_zero.recipe.recipe import DataSection

logger = logging.getLogger(__name__)


def load_trl_splits(data: DataSection, keeps_others: bool) -> tuple[Dataset, Dataset]:
    """The training and evaluation examples of a recipe with an objective.

    Args:
        data: the recipe's section.
        keeps_others: whether to keep the other columns, which reward functions get.

    Returns: the splits; the columns of `data.columns` are called by their roles.

    Raises UserError: see `load_splits`; a column is missing or of another type.
    """
    roles = data.columns.model_dump(exclude_none=True)
    splits = []
    for name, split in zip(("training", "evaluation"), load_splits(data), strict=True):
        check_columns(split, data.columns, name)
        split = without_incomplete(split, data.columns, name)
        if not keeps_others:
            split = split.select_columns(list(dict.fromkeys(roles.values())))
        for role, column in roles.items():
            if role != column and role in split.column_names:
                raise UserError(
                    f"data.columns.{role}: the {name} data has another column '{role}' besides '{column}': rename it, "
                    "because TRL would take it for that part"
                )
        splits.append(split.rename_columns({column: role for role, column in roles.items() if role != column}))
    return splits[0], splits[1]
