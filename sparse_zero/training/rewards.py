"""The reward functions of a recipe."""

from collections.abc import Callable

from rpn.user_noise import NoiseNotFound, load_noise
from sparse_zero.errors import UserError
from sparse_zero.recipe.objective import reward_functions
from sparse_zero.recipe.recipe import Recipe


def load_rewards(recipe: Recipe) -> list[Callable]:
    """Import the functions that `training.reward_funcs` names.

    Each is called as in TRL: reward(prompts=..., completions=..., COLUMN=..., ...), with lists of the same length, and
    returns a list of numbers, or None for an example that it does not judge.

    Raises UserError: there is no such file, module or function. Exceptions of the user's code pass through.
    """
    functions = []
    for name in reward_functions(recipe.training):
        try:
            functions.append(load_noise(name))
        except NoiseNotFound as error:
            raise UserError(f"training.reward_funcs: {error}") from None
    return functions
