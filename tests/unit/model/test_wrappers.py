"""What wraps a model: every function finds the sparse model inside, and names are those of the inner model."""

import copy
import pickle

import pytest
import torch
from accelerate import Accelerator
from sparse_cases import nudge
from torch import nn
from torch.optim.swa_utils import AveragedModel

from sparse_zero.adapters.save_and_load import load_adapter, save_adapter
from sparse_zero.adapters.switching import merge_adapter, unmerge_adapter
from sparse_zero.errors import UserError
from sparse_zero.model.sparsify import disable_adapter, merge_and_unload, sparsify, sparsity_of, unload
from sparse_zero.model.wrappers import unwrap
from sparse_zero.selection.config import SparseConfig

CONFIG = SparseConfig(density=0.2, targets="all-linear")
INPUTS = torch.ones(2, 6)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


def wrapper(class_name: str, attribute: str, base: type[nn.Module] = nn.Module) -> type[nn.Module]:
    """A class of this name, which wraps a module as its `attribute`."""

    class Wrapper(base):
        def __init__(self, module: nn.Module) -> None:
            nn.Module.__init__(self)
            setattr(self, attribute, module)

        def __getattr__(self, name: str):
            """DeepSpeed's engine and others pass the access to attributes on."""
            inner = self.__dict__["_modules"][attribute]
            return inner if name == attribute else getattr(inner, name)

        def forward(self, *args, **kwargs):
            return self._modules[attribute](*args, **kwargs)

    Wrapper.__name__ = class_name
    return Wrapper


def in_fabric(module: nn.Module) -> nn.Module:
    wrapped = wrapper("_FabricModule", "_forward_module")(module)
    wrapped._original_module = module
    return wrapped


def in_peft(model: nn.Module) -> nn.Module:
    tuner = wrapper("SparseZeroModel", "model", wrapper("BaseTuner", "model"))
    return wrapper("PeftModel", "base_model")(tuner(model))


DDP = wrapper("DistributedDataParallel", "module")
ENGINE = wrapper("DeepSpeedEngine", "module")
WRAPPERS = {
    "DDP": DDP,
    "DeepSpeed": ENGINE,
    "a subclass of DeepSpeed's engine": wrapper("PipelineEngine", "module", ENGINE),
    "DataParallel": nn.DataParallel,
    "averaged": AveragedModel,
    "compiled": torch.compile,
    "Fabric": in_fabric,
    "PEFT": in_peft,
    "DDP, compiled": lambda model: torch.compile(DDP(model)),
    "compiled, DDP": lambda model: DDP(torch.compile(model)),
    "Fabric, DDP, compiled": lambda model: in_fabric(DDP(torch.compile(model))),
    "compiled, PEFT": lambda model: torch.compile(in_peft(model)),
    "unknown": wrapper("Unknown", "module"),
    "unknown, DDP": lambda model: wrapper("Unknown", "module")(DDP(model)),
    "Accelerate": lambda model: Accelerator(cpu=True).prepare(model),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_sparse_model_is_saved_and_loaded(tmp_path, wrap):
    model = sparsify(mlp(), CONFIG)
    nudge(model)
    expected = model(INPUTS)
    save_adapter(wrap(model), tmp_path)
    assert torch.equal(load_adapter(mlp(), tmp_path)(INPUTS), expected)


@pytest.mark.parametrize("wrap", [w for name, w in WRAPPERS.items() if "PEFT" not in name and name != "averaged"])
def test_an_adapter_is_loaded_on_a_wrapped_model(tmp_path, wrap):
    model = sparsify(mlp(), CONFIG)
    nudge(model)
    save_adapter(model, tmp_path)
    base = mlp()
    load_adapter(wrap(base), tmp_path)
    assert torch.equal(base(INPUTS), model(INPUTS))
    assert base.sparsity.weights.keys() == model.sparsity.weights.keys()


@pytest.mark.parametrize("wrap", [torch.compile, DDP, in_fabric])
def test_the_other_functions_find_the_model_too(wrap):
    base, model = mlp(), sparsify(mlp(), CONFIG)
    nudge(model)
    trained, wrapped = model(INPUTS), wrap(model)
    with disable_adapter(wrapped):
        assert torch.equal(model(INPUTS), base(INPUTS))
    merge_adapter(wrapped)
    assert not hasattr(model, "sparsity")
    unmerge_adapter(wrapped)
    assert torch.equal(model(INPUTS), trained)
    assert unload(wrapped) is model
    assert torch.equal(model(INPUTS), base(INPUTS))
    with pytest.raises(UserError, match="Sequential is not sparse"):
        sparsity_of(wrapped)


def test_a_compiled_model_becomes_sparse_by_the_names_of_the_model():
    compiled = torch.compile(mlp(), backend="eager")
    assert sparsify(compiled, CONFIG) is compiled
    assert list(sparsity_of(compiled).weights) == ["0.weight", "2.weight"]
    compiled(INPUTS).sum().backward()
    assert all(weight.delta.grad is not None for weight in sparsity_of(compiled).weights.values())
    merged = merge_and_unload(compiled)
    assert type(merged) is nn.Sequential


def test_a_model_that_is_compiled_in_place(tmp_path):
    model = sparsify(mlp(), CONFIG)
    model.compile(backend="eager")
    nudge(model)
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(mlp(), tmp_path)(INPUTS), model(INPUTS))


def test_copies_of_a_module_that_is_compiled_in_place():
    model = sparsify(mlp(), CONFIG)
    nudge(model)
    model[0].compile(backend="eager")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin[0]._compiled_call_impl is None, "like a copy of nn.Linear"
        assert torch.equal(twin(INPUTS), model(INPUTS))


@pytest.mark.parametrize("wrap", [DDP, ENGINE, nn.DataParallel, lambda model: torch.compile(DDP(model))])
def test_a_wrapper_that_would_not_see_the_deltas_is_refused(wrap):
    model = mlp()
    with pytest.raises(UserError, match=r"wrapped in D\w+, .*: call sparsify before you wrap the model"):
        sparsify(wrap(model), CONFIG)
    assert not hasattr(model, "sparsity")


class WithSubmodule(nn.Module):
    """A user's own model, whose submodule is called `module`."""

    def __init__(self) -> None:
        super().__init__()
        self.module, self.head = mlp(), nn.Linear(2, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.module(inputs))


@pytest.mark.parametrize("wrap", [lambda model: model, DDP, torch.compile])
def test_a_users_submodule_called_module_stays(tmp_path, wrap):
    base = WithSubmodule()
    model = sparsify(copy.deepcopy(base), CONFIG)
    nudge(model)
    assert unwrap(wrap(model)) is model
    assert list(model.sparsity.weights) == ["module.0.weight", "module.2.weight", "head.weight"]
    save_adapter(wrap(model), tmp_path)
    load_adapter(wrap(base), tmp_path)
    assert torch.equal(base(INPUTS), model(INPUTS))
    assert unwrap(base) is base
    assert unwrap(unload(base)) is base


def test_a_model_is_not_unwrapped_because_it_looks_like_a_wrapper():
    model = WithSubmodule()
    assert unwrap(model) is model
    with pytest.raises(UserError, match="WithSubmodule is not sparse"):
        sparsity_of(model)


def test_layers_that_are_compiled_later_keep_their_names(tmp_path):
    model = sparsify(mlp(), SparseConfig(density=0.5, targets="all-linear", modules_to_save=["2"]))
    nudge(model)
    expected = model(INPUTS)
    model[0], model[2] = torch.compile(model[0]), torch.compile(model[2])
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(mlp(), tmp_path)(INPUTS), expected)
