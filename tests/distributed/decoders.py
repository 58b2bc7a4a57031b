"""A tiny decoder of a family, whole, and the same one with its experts on several ranks."""

import torch
from torch import Tensor

from moebius.distributed.config import Batch, DistributedConfig
from moebius.distributed.expert_parallel import ParallelExperts, parallel_experts
from moebius.distributed.header import StepHeader
from moebius.distributed.ranks import Ranks
from moebius.experts.contract import SEGMENTS
from moebius.experts.interface import Experts
from moebius.layers.decoder import Decoder
from moebius.models import family_of
from moebius.quantization.decoding import quantize
from moebius.quantization.forms import Form
from tests.families import randomize, tiny_config


def whole_decoder(family: str, form: Form | None = None, **changes: int) -> Decoder:
    """In float32, every parameter random; its experts in the form."""
    raw = tiny_config(family, **changes)
    decoder = Decoder(family_of(raw).from_hf(raw))
    decoder.init_weights()
    randomize(decoder, 0)
    for experts in experts_of(decoder):
        for name, segments in SEGMENTS.items() if form else ():
            values, scales = quantize(form, experts.get_parameter(name).detach(), segments)
            experts.hold(name, form)
            fill(experts, {name: values, f"{name}_scale": scales})
    return decoder


def parallel_decoder(whole: Decoder, ranks: Ranks, batch: Batch) -> tuple[Decoder, StepHeader]:
    """This rank's part of the whole one, and the header before each of its forwards."""
    config = DistributedConfig(ep_size=ranks.size, batch=batch)
    decoder = Decoder(whole.config, experts_class=parallel_experts(ranks, config))
    decoder.to(ranks.device)
    held = {name: form for experts in experts_of(whole) for name in SEGMENTS if (form := experts.form_of(name))}
    for experts in experts_of(decoder):
        for name, form in held.items():
            experts.hold(name, form)
    rows = expert_rows(decoder)
    tensors = whole.state_dict()
    fill(decoder, {name: of_rows(tensors[name], rows.get(name)) for name in decoder.state_dict()})
    header = StepHeader(ranks, batch)
    decoder.register_forward_pre_hook(header, with_kwargs=True)
    return decoder, header


def experts_of(decoder: Decoder) -> list[Experts]:
    return [module for module in decoder.modules() if isinstance(module, Experts)]


def expert_rows(decoder: Decoder) -> dict[str, range]:
    """Of each tensor of routed experts, which it holds."""
    return {
        f"{path}.{name}": module.held
        for path, module in decoder.named_modules()
        if isinstance(module, ParallelExperts)
        for name, _ in module.named_parameters()
    }


def of_rows(tensor: Tensor, rows: range | None) -> Tensor:
    return tensor if rows is None else tensor[rows.start : rows.stop]


@torch.no_grad()
def fill(module: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
    """Bytes as they are: a form's values have dtypes that nothing but a copy takes."""
    state = module.state_dict()
    for name, tensor in tensors.items():
        assert state[name].shape == tensor.shape, name
        state[name].copy_(tensor)
