"""A run as a Slurm job: options of sbatch, the batch script, its submission.

Others import from `sbatch_options`, `submit`.
"""
