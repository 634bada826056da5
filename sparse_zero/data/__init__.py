"""Base models, tokenizers and data: loading, tokenisation, packing, samplers and metrics.

Others import from `datasets`, `files`, `forms`, `metrics`, `models`, `package`, `packing`, `preview`, `sampling`,
`trl_columns`.
"""
