"""`sparse-zero doctor`: checks hosts, network, Slurm and input files before a run.

Others import from `diagnosis`, `links`.
"""
