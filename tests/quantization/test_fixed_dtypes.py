"""What must keep its dtype keeps it, whatever is done to the model around it."""

import copy

import pytest
import torch
from torch import nn

from moebius.quantization.fixed_dtypes import FixedDtypes


class Layer(FixedDtypes):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3))
        self.gate = nn.Parameter(torch.randn(4))
        self.packed = nn.Parameter(torch.randn(4).to(torch.float8_e4m3fn), requires_grad=False)
        self.register_buffer("offset", torch.randn(4))
        self.inner = nn.Linear(2, 2)
        self.fix_dtypes("gate", "packed", "offset", "made_later")


CASTS = {
    "to": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "bfloat16": lambda model: model.bfloat16(),
    "to another tensor": lambda model: model.to(torch.empty(0, dtype=torch.float16)),
    "to device and dtype": lambda model: model.to("cpu", torch.float16),
}


def dtypes(layer: Layer) -> list[torch.dtype]:
    return [layer.gate.dtype, layer.packed.dtype, layer.offset.dtype]


FIXED = [torch.float32, torch.float8_e4m3fn, torch.float32]


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_a_cast_of_the_model_leaves_them_alone_and_nothing_else(cast):
    model = nn.Sequential(Layer())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layer = cast(model)[0]
    assert dtypes(layer) == FIXED
    assert layer.weight.dtype == layer.inner.weight.dtype != torch.float32
    for name in ("gate", "packed", "offset"):
        assert torch.equal(model.state_dict()[f"0.{name}"].float(), before[f"0.{name}"].float())


def test_they_follow_to_another_device():
    layer = Layer().to("meta", torch.bfloat16)
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
    assert dtypes(layer) == FIXED
    layer = layer.to_empty(device="cpu")
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"cpu"}
    assert dtypes(layer) == FIXED
    assert layer.weight.dtype == torch.bfloat16


def test_leaving_meta_by_to_is_still_an_error():
    with pytest.raises(NotImplementedError, match="to_empty"):
        Layer().to("meta").to("cpu")


def test_a_gradient_keeps_the_dtype_of_its_parameter():
    layer = Layer()
    (layer.gate.sum() + layer.weight.sum()).backward()
    layer.half()
    assert layer.gate.grad is not None
    assert layer.gate.grad.dtype == torch.float32
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float16


def test_what_is_made_later_under_the_name_is_kept_too():
    layer = Layer()
    layer.made_later = nn.Parameter(torch.ones(2))
    assert layer.half().made_later.dtype == torch.float32


def with_another(model: nn.Sequential) -> nn.Sequential:
    model[0].packed = nn.Parameter(torch.zeros(3), requires_grad=False)
    return model


REPLACED = {
    "nothing": lambda model: model,
    "another device": lambda model: model.to("meta").to_empty(device="cpu"),
    "a cast": lambda model: model.half(),
    "a state dict": lambda model: model.load_state_dict(model.state_dict(), assign=True) and model,
    "a deep copy": copy.deepcopy,
    "another parameter": with_another,
}


@pytest.mark.parametrize("replace", REPLACED.values(), ids=REPLACED)
def test_what_has_no_gradient_takes_none_whatever_is_done_to_it(replace):
    model = replace(nn.Sequential(Layer()))
    model.requires_grad_(True)
    for parameter in model.parameters():
        parameter.requires_grad = True
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["0.packed"]
    assert not (model[0].packed.float() * 2).requires_grad


def test_what_was_only_frozen_takes_a_gradient_again():
    model = nn.Sequential(Layer()).requires_grad_(False)
    model.load_state_dict(model.state_dict(), assign=True)
    assert model.requires_grad_(True)[0].gate.requires_grad


def test_the_state_dict_is_that_of_a_plain_module():
    layer = Layer()
    assert list(layer.state_dict()) == ["weight", "gate", "packed", "offset", "inner.weight", "inner.bias"]
    other = Layer()
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(other.gate, layer.gate)
    assert torch.equal(other.packed.view(torch.uint8), layer.packed.view(torch.uint8))
