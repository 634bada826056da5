"""Quantised linear layers, by the library that made them: what a packed weight is, and a dequantised copy of it.

A format is a subclass of `layer.QuantizedLayer` in a module of its own, which `formats.FORMATS` lists. Nothing here
changes a layer. The libraries are imported when one of their layers is used.

Others import from `formats`, `layer`, `methods`, `names`, `quiet_imports`.
"""
