"""`sparse-zero doctor`: examines hosts, network, Slurm and inputs before a run.

Others import from `examination`, `links`.
"""
