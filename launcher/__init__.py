"""The `sparse-zero` command, and the ways to start ranks."""
