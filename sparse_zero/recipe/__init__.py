"""The schema of a recipe, and the files that ship with the package. Imports no torch, but for `training`.

Others import from `launch`, `recipe`, `shipped`, `training`.
"""
