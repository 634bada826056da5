"""Adapter directories: save, load, switch, combine, inspect, and convert from and to other formats.

Others import from `combine`, `files`, `formats.convert`, `inspection`, `model_card`, `reading`,
`save_and_load`, `schema`, `switching`.
"""
