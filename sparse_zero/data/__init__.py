"""Base models, tokenizers and data: loading, tokenisation, packing, samplers and metrics.

Others import from `columns`, `conversations`, `datasets`, `file_names`, `files`, `forms`, `general_text`, `gguf`,
`metrics`, `models`, `package`, `packing`, `preview`, `quantization`, `sampling`, `splits`, `trl_columns`.
"""
