"""Selection of the trained scalars: configuration, target parameters, budget, and the rules that draw positions.

Others import from `checks`, `columns`, `config`, `draws`, `hashes`, `input_columns`, `rules`, `selector`, `targets`,
`threads`, `unsupported`.
"""
