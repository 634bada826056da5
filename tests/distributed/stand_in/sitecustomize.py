"""On the module path, ranks of `sparse_zero.train` have `training_run.py` in place of the training."""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path


class _StandIn:
    @staticmethod
    def find_spec(name: str, *_: object) -> ModuleSpec | None:
        if name != "sparse_zero.training.run":
            return None
        return importlib.util.spec_from_file_location(name, Path(__file__).with_name("training_run.py"))


sys.meta_path.insert(0, _StandIn)
