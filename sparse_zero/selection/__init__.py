"""Which scalars are trained: the configuration, the targets, the budget and the rules that draw positions.

Others import from `config`, `rules`, `selector`, `targets`, `threads`.
"""
