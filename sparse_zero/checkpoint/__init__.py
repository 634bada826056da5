"""Sharded checkpoints: written by all ranks, complete or absent, resumed on any number of ranks.

Others import from `directory`, `engine_state`, `export`, `output_lock`, `random_states`, `resumption`, `saving`.
"""
