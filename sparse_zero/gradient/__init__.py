"""Sampled gradients: the gradient of a weight at its selected positions only, on CPUs and GPUs.

Others import from `cost`, `cpu`, `pattern`, `sampled`, `triton_writes`.
"""
