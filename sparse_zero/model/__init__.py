"""The parametrisation: a frozen weight with a trainable delta at its selected positions, and `sparsify`,
which gives it to a model.

Others import from `fingerprint`, `sparsify`, `weight`.
"""
