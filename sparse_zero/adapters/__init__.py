"""The adapter directory: saved, loaded, switched, combined, inspected, and converted from and to other formats.

Others import from `combine`, `exchange.convert`, `files`, `inspection`, `model_card`, `save_and_load`, `switching`.
"""
