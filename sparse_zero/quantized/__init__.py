"""Quantised linear layers, by the library that made them: what a packed weight is, and a dequantised copy of it.

<<<<<<< HEAD
Nothing here changes a layer. A format is a subclass of `layer.QuantizedLayer` in a module of its own. The libraries
are imported when one of their layers is used.

Others import from `formats`, `layer`, `methods`, `names`.
=======
A format is a subclass of `QuantizedLayer` in a module of its own, which `formats.FORMATS` lists. The libraries are
imported when one of their layers is used.

Others import from `formats`, `layer`.
>>>>>>> quant
"""
