"""Base models, tokenizers and data: loading, tokenisation, packing, samplers and metrics.

Others import from `datasets`, `files`, `metrics`, `models`, `package`, `packing`, `sampling`.
"""
