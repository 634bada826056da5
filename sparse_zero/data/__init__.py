"""Base models, tokenizers and data sets: loaded, encoded, sampled and measured.

Others import from `datasets`, `encoding`, `metrics`, `models`, `package`, `sampling`.
"""
