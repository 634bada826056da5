"""What DeepSpeed ZeRO does to parameters, and which rank holds which trained scalars.

Others import from `parameters`, `partitions`, `resharding`.
"""
