"""Adapter directories: save, load, switch, combine, inspect, and convert from and to other formats.

Others import from `base_and_adapter`, `combine`, `files`, `formats.convert`, `hub`, `inspection`, `merging`,
`model_card`, `reading`, `save_and_load`, `schema`, `switching`.
"""
