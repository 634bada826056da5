"""Access to parameters and optimizer states that DeepSpeed ZeRO partitions, and the arithmetic of resharding them.

Others import from `parameters`, `partitions`, `resharding`.
"""
