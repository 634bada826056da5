"""Selection of the trained scalars: configuration, target parameters, budget, and the rules that draw positions.

Others import from `config`, `rules`, `selector`, `targets`, `threads`, `unsupported`.
"""
