"""Models and parameters that cannot be trained are refused before anything is changed; others may be in the model."""

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from torch import nn
from torch.nn.utils import parametrizations, weight_norm
from torch.utils._pytree import tree_map_only

from sparse_zero.adapters.save_and_load import load_adapter, save_adapter
from sparse_zero.errors import UserError
from sparse_zero.model.sparsify import merge_and_unload, sparsify, unload
from sparse_zero.selection.config import SparseConfig

ALL = SparseConfig(density=0.2, targets="all")
LINEAR = SparseConfig(density=0.2, targets="all-linear")
BOTH = pytest.mark.parametrize("config", [ALL, LINEAR], ids=["all", "all-linear"])
INPUTS = torch.ones(3, 6)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


class Dispatching(torch.Tensor):
    """A tensor subclass that contains another tensor, like those of torchao, quanto and torch's DTensor."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Dispatching":
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        if func.overloadpacket not in (torch.ops.aten.detach, torch.ops.aten.t, torch.ops.aten.addmm):
            raise NotImplementedError(func)
        result = func(*tree_map_only(cls, lambda tensor: tensor.inner, args), **(kwargs or {}))
        return result if func.overloadpacket == torch.ops.aten.addmm else cls(result)


class TorchAOBaseTensor(Dispatching):
    """The base class of torchao's tensors has this name."""


class Int8Tensor(TorchAOBaseTensor):
    """A quantized tensor of torchao."""


class QTensor(Dispatching):
    """The base class of quanto's tensors has this name."""


class DTensor(Dispatching):
    """The class of torch's sharded tensors has this name."""


class Params4bit(nn.Parameter):
    """The parameter of bitsandbytes, which contains 4-bit values as uint8."""

    def __new__(cls, data: torch.Tensor) -> "Params4bit":
        return torch.Tensor._make_subclass(cls, (data > 0).to(torch.uint8).reshape(-1, 1), False)


class Marked(nn.Parameter):
    """A parameter of a class that only has more attributes."""


def converted(dtype: torch.dtype) -> Callable[[torch.Tensor], nn.Parameter]:
    return lambda values: nn.Parameter(values.to(dtype), requires_grad=dtype.is_complex)


def inference(values: torch.Tensor) -> nn.Parameter:
    with torch.inference_mode():
        return nn.Parameter(values.clone())


QUANTIZED = {
    "int64": (converted(torch.int64), "has dtype int64: such quantised weights cannot be trained; load"),
    "uint8": (converted(torch.uint8), "has dtype uint8: such quantised"),
    "bool": (converted(torch.bool), "has dtype bool: such quantised"),
    "float8": (converted(torch.float8_e4m3fn), "has dtype float8_e4m3fn: such quantised"),
    "complex": (converted(torch.complex64), "has dtype complex64: complex weights cannot be trained; exclude it"),
    "torchao": (lambda values: nn.Parameter(Int8Tensor(values), False), "is a Int8Tensor of torchao: such quantised"),
    "quanto": (lambda values: nn.Parameter(QTensor(values), False), "is a QTensor of quanto: such quantised"),
    "bitsandbytes": (Params4bit, "is a Params4bit of bitsandbytes: such quantised"),
}
OTHERS = {
    "DTensor": (lambda values: nn.Parameter(DTensor(values), False), "is a DTensor .*: call sparsify on a model that"),
    "subclass": (
        lambda values: nn.Parameter(Dispatching(values), False),
        "is a Dispatching, a subclass of torch.Tensor",
    ),
    "inference": (
        inference,
        "was created under torch.inference_mode and can never be trained: load the model outside",
    ),
}
KINDS = QUANTIZED | OTHERS


def with_weight(kind: str) -> tuple[nn.Module, str]:
    """An MLP whose first weight is of a kind, and the expected message."""
    make, message = KINDS[kind]
    model = mlp()
    model[0]._parameters["weight"] = make(model[0].weight.data)
    return model, message


class State:
    """What must not have changed."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before = self.now()

    def now(self) -> list[tuple]:
        return [
            *((name, id(p), p.requires_grad) for name, p in self.model.named_parameters()),
            *((name, type(module), sorted(vars(module))) for name, module in self.model.named_modules()),
            *((name, id(buffer)) for name, buffer in self.model.named_buffers()),
        ]

    def is_unchanged(self) -> bool:
        return self.now() == self.before


def refused(model: nn.Module, message: str, config: SparseConfig = LINEAR, **options) -> None:
    state = State(model)
    with pytest.raises(UserError, match=message) as error:
        sparsify(model, config, **options)
    assert "\n" not in str(error.value)
    assert state.is_unchanged()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("selection", ["stratified", "magnitude"])
def test_a_target_that_cannot_be_trained_is_refused(kind, selection):
    model, message = with_weight(kind)
    for targets in ("all-linear", ["0"], ["0.weight"]):
        config = SparseConfig(density=0.2, targets=targets, selection=selection)
        refused(model, rf"^sparse\.targets: 0\.weight {message}", config)


@pytest.mark.parametrize("kind", KINDS)
def test_so_are_given_positions_and_a_module_that_is_trained_in_full(kind):
    model, message = with_weight(kind)
    refused(model, rf"^0\.weight {message}", positions={"0.weight": torch.tensor([0])})
    config = SparseConfig(density=0.9, targets=["2"], modules_to_save=["0"])
    refused(model, rf"^0\.weight {message}", config)


@pytest.mark.parametrize("kind", KINDS)
def test_so_is_an_adapter_for_it(tmp_path, kind):
    save_adapter(sparsify(mlp(), LINEAR), tmp_path)
    model, message = with_weight(kind)
    if kind == "bitsandbytes":
        message = "does not fit Sequential: '0.weight' has shape"
    state = State(model)
    with pytest.raises(UserError, match=message):
        load_adapter(model, tmp_path)
    assert state.is_unchanged()


@pytest.mark.parametrize("kind", QUANTIZED)
def test_all_leaves_it_out_and_says_so(caplog, kind):
    model, message = with_weight(kind)
    with caplog.at_level(logging.WARNING):
        sparsify(model, ALL)
    assert list(model.sparsity.weights) == ["0.bias", "2.weight", "2.bias"]
    (warning,) = caplog.messages
    assert warning.startswith("sparse.targets: all leaves out 0.weight, which cannot be trained: it ")
    assert message.partition(":")[0] in warning


@pytest.mark.parametrize("kind", OTHERS)
def test_all_does_not_leave_out_what_is_sharded_or_unknown(kind):
    model, message = with_weight(kind)
    refused(model, message, ALL)


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_that_is_not_trained_may_be_of_any_kind(tmp_path, kind):
    base, _ = with_weight(kind)
    others = [p for p in base.parameters() if p is not base[0].weight]
    config = SparseConfig(density=0.2, targets=["2"])
    sparsify(base, config)
    weight = base[0].weight
    assert not weight.requires_grad
    if kind in ("torchao", "quanto", "DTensor", "subclass"):
        base(INPUTS).sum().backward()
        assert base.sparsity.weights["2.weight"].delta.grad is not None
    base.sparsity.weights["2.weight"].delta.data.fill_(0.5)
    save_adapter(base, tmp_path)
    loaded = load_adapter(with_weight(kind)[0], tmp_path)
    merged = merge_and_unload(loaded)[2].weight
    assert torch.equal(merged, merge_and_unload(base)[2].weight)
    assert all(p.requires_grad for p in others)


@pytest.mark.parametrize("kind", ["int64", "bool", "bitsandbytes"])
def test_unload_leaves_integers_without_gradients(kind):
    model, _ = with_weight(kind)
    unload(sparsify(model, SparseConfig(density=0.2, targets=["2"])))
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]


def test_a_parameter_class_with_attributes_only_is_trained():
    model = mlp()
    model[0].weight = Marked(model[0].weight.data)
    sparsify(model, LINEAR)(INPUTS).sum().backward()
    assert model.sparsity.weights["0.weight"].delta.grad is not None


def test_nothing_is_left_of_all():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    model[0].weight = converted(torch.int8)(model[0].weight.data)
    refused(model, r"0\.weight has dtype int8", ALL)


# Models


@BOTH
def test_a_model_without_values(config):
    with torch.device("meta"):
        model = mlp()
    refused(model, r"^0\.weight is on the meta device, without values: load the weights", config)
    refused(model, r"^0\.weight is on the meta device", config.model_copy(update={"selection": "magnitude"}))
    model = mlp()
    model[2].bias = nn.Parameter(torch.empty(2, device="meta"))
    refused(model, r"^2\.bias is on the meta device", config)


def test_an_adapter_for_a_model_without_values(tmp_path):
    save_adapter(sparsify(mlp(), LINEAR), tmp_path)
    with torch.device("meta"):
        model = mlp()
    with pytest.raises(UserError, match=r"^0\.weight is on the meta device"):
        load_adapter(model, tmp_path)


def test_a_model_that_accelerate_offloads(tmp_path):
    model = mlp()
    cpu_offload(model, execution_device=torch.device("cpu"))
    refused(model, r"^0\.weight is offloaded by Accelerate .*: load the model without offloading")
    save_adapter(sparsify(mlp(), LINEAR), tmp_path)
    with pytest.raises(UserError, match=r"^0\.weight is offloaded by Accelerate"):
        load_adapter(model, tmp_path)


def test_a_sparse_model_that_accelerate_offloads():
    model = sparsify(mlp(), LINEAR)
    with pytest.raises(UserError, match=r"^0\.weight is offloaded by Accelerate"):
        cpu_offload(model, execution_device=torch.device("cpu"))(INPUTS)


def test_a_device_map_without_offloading_trains():
    model = dispatch_model(mlp(), {"0": "cpu", "1": "cpu", "2": "cpu"}, main_device="cpu", force_hooks=True)
    assert hasattr(model[0], "_hf_hook")
    sparsify(model, LINEAR)(INPUTS).sum().backward()
    assert all(weight.delta.grad is not None for weight in model.sparsity.weights.values())


class FullyShardedDataParallel(nn.Module):
    """The class of FSDP has this name."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module


class FSDPModule:
    """FSDP2 adds this class to the classes of modules."""


class FSDPLinear(FSDPModule, nn.Linear):
    """What FSDP2 makes of a linear layer."""


@BOTH
def test_a_sharded_model(config):
    model = nn.Sequential(FullyShardedDataParallel(mlp()), nn.Linear(2, 2))
    refused(model, r"^0 is sharded by FSDP: call sparsify on a model that is not sharded", config)
    refused(nn.Sequential(nn.Linear(6, 6), FSDPLinear(6, 6)), r"^1 is sharded by FSDP", config)
    with pytest.raises(UserError, match="wrapped in FullyShardedDataParallel"):
        sparsify(FullyShardedDataParallel(mlp()), config)


def test_a_lazy_module():
    refused(
        nn.Sequential(nn.Linear(6, 6), nn.LazyLinear(3)), r"^1\.weight has no shape yet \(a lazy module\): run one"
    )


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_scripts(tmp_path):
    model = nn.Sequential(nn.Linear(6, 6), torch.jit.script(mlp()))
    in_script = r"1\.0\.weight is in a torch.jit script, whose code cannot be changed: exclude it"
    refused(model, in_script, SparseConfig(density=0.2, targets=["1.0.weight"]))
    refused(torch.jit.script(mlp()), "^the model is a torch.jit script")
    sparsify(model, ALL)(INPUTS).sum().backward()
    assert list(model.sparsity.weights) == ["0.weight", "0.bias"]
    assert model.sparsity.weights["0.weight"].delta.grad is not None


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_script_can_be_trained_in_full():
    model = nn.Sequential(nn.Linear(6, 6), torch.jit.script(mlp()))
    sparsify(model, SparseConfig(density=0.9, targets=["0"], modules_to_save=["1"]))
    model(INPUTS).sum().backward()
    assert all(p.grad is not None for p in model[1].parameters())


PARAMETRIZED = {
    "weight norm": (parametrizations.weight_norm, "parametrizations.weight.original1"),
    "old weight norm": (weight_norm, "weight_v"),
    "orthogonal": (parametrizations.orthogonal, "parametrizations.weight.original"),
}


@BOTH
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_what_a_parametrization_computes_a_weight_from_is_trained(kind, config):
    parametrize, name = PARAMETRIZED[kind]
    model, dense = mlp(), mlp()
    parametrize(model[0]), parametrize(dense[0])
    dense.load_state_dict(model.state_dict())
    sparsify(model, config)
    for one in (model, dense):
        one(INPUTS).square().sum().backward()
    weight = model.sparsity.weights[f"0.{name}"]
    expected = dict(dense.named_parameters())[f"0.{name}"].grad.flatten()[weight.flat_positions()]
    torch.testing.assert_close(weight.delta.grad, expected)


# Modes


def test_a_model_that_becomes_sparse_under_inference_mode_can_be_trained(tmp_path):
    model, loaded = mlp(), mlp()
    with torch.inference_mode():
        sparsify(model, LINEAR)
        save_adapter(model, tmp_path)
        load_adapter(loaded, tmp_path)
        loaded(INPUTS)
    for one in (model, loaded):
        one(INPUTS).sum().backward()
        assert all(weight.delta.grad is not None for weight in one.sparsity.weights.values())


def test_a_replica_of_data_parallel_is_refused():
    with pytest.raises(UserError, match=r"nn\.DataParallel .*: use DistributedDataParallel"):
        sparsify(mlp(), LINEAR)[0]._replicate_for_data_parallel()
    model = sparsify(mlp(), LINEAR)
    assert torch.equal(nn.DataParallel(model)(INPUTS), model(INPUTS)), "on one device it only calls the module"


@pytest.mark.parametrize(("before", "after"), [(torch.float32, torch.float16), (torch.float16, torch.float32)])
def test_a_model_that_is_converted_to_or_from_float16(tmp_path, caplog, before, after):
    base = mlp().to(before)
    model = sparsify(copy.deepcopy(base), LINEAR).to(after)
    save_adapter(model, tmp_path)
    load_adapter(copy.deepcopy(base), tmp_path)
    assert caplog.messages == []
    load_adapter(base.to(after), tmp_path)
    assert "not checked against the base model's weights" in caplog.text
