"""Sharded checkpoints: written by all ranks, complete or absent, and resumed on any number of ranks.

Others import from `deepspeed_state`, `directory`, `export`, `loader`, `manifest`, `output_lock`, `random_states`,
`resume`, `saved_state`, `trainer_state`, `writer`.
"""
