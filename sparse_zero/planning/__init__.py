"""Plans the memory of each rank and the traffic between ranks before a run starts.

Others import from `gpu_memory`, `plan`, `planned_run`, `proposal`.
"""
