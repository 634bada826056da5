"""`sparse-zero compare`: the same recipe with several methods, rates and seeds, and a table of what came out.

Others import from `command`, `options`.
"""
