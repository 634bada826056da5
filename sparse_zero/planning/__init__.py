"""What a run will hold in memory and send between ranks, computed before it starts.

Others import from `from_recipe`, `gpu_memory`.
"""
