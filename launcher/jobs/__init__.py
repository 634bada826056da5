"""Runs as Slurm jobs: the options of sbatch, the batch script, its submission.

Others import from `sbatch_options`, `submit`.
"""
