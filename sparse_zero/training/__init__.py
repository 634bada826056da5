"""A training run: from a recipe to a trainer, its progress, its evaluation and its report.

Others import from `build`, `evaluate`, `rate_search`, `recipe_check`, `rewards`, `run`, `run_settings`, `trainer`,
`trl_arguments`.
"""
