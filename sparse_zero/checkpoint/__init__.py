"""Sharded checkpoints: written by all ranks, complete or absent, and resumed on any number of ranks.

Others import from `branches`, `deepspeed_state`, `directory`, `export`, `listing`, `loader`, `manifest`,
`output_lock`, `random_states`, `resume`, `saved_state`, `settings`, `shards`, `trainer_state`, `writer`.
"""
