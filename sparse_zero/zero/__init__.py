"""Access to parameters and optimizer states that DeepSpeed ZeRO partitions, and the arithmetic of resharding them.

Others import from `loading`, `parameters`, `partitions`, `resharding`.
"""
