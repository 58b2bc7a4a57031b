"""The decoder: embedding, layers, final norm, head, and the losses of a causal language model.

B batch, T tokens of this forward, P tokens in the cache before it, H hidden, V vocabulary, E experts.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebius.config import (
    DecoderConfig,
    DenseMlp,
    GroupedQueryAttention,
    LatentAttention,
    LayerConfig,
    Mixer,
    Rope,
    SparseMoe,
)
from moebius.errors import ArgumentError, Fault
from moebius.experts.interface import AUTO, Experts
from moebius.experts.select import Choice
from moebius.layers.attention import Cache, GroupedQueryAttentionLayer, LayerCache
from moebius.layers.latent_attention import LatentAttentionLayer
from moebius.layers.masks import causal_masks
from moebius.layers.mlp import Mlp
from moebius.layers.moe import MakeExperts, SparseMoeBlock
from moebius.layers.norm import RmsNormLayer
from moebius.layers.roles import Role, parameter_roles
from moebius.layers.rope import RotaryTables, rotary_tables
from moebius.layers.router import RouterChoice, load_balancing_loss

IGNORED_LABEL = -100


@dataclass
class CausalLMOutput:
    """What a forward gives; a field is None where it was not asked for.

    loss: float32 scalar.  logits: [B, T or logits_to_keep, V].  aux_loss: float32 scalar, before its coefficient.
    router_logits: [B*T, E] of each sparse layer, in order.
    """

    loss: Tensor | None
    logits: Tensor
    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: LayerConfig, decoder: DecoderConfig, *, make_experts: MakeExperts) -> None:
        super().__init__()
        self.self_attn = _mixer(config, decoder)
        self.mlp = _feed_forward(config, decoder, make_experts)
        self.input_layernorm = RmsNormLayer(decoder.norm, decoder.hidden_size)
        self.post_attention_layernorm = RmsNormLayer(decoder.norm, decoder.hidden_size)

    def forward(
        self, hidden_states: Tensor, rotary: RotaryTables, mask: Tensor | None, cache: LayerCache | None
    ) -> tuple[Tensor, RouterChoice | None]:
        """[B, T, H] -> [B, T, H], and the router's choice where the layer is sparse."""
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), rotary, mask, cache)
        output, choice = self._feed_forward(self.post_attention_layernorm(hidden_states))
        return hidden_states + output, choice

    def _feed_forward(self, hidden_states: Tensor) -> tuple[Tensor, RouterChoice | None]:
        match self.mlp:
            case SparseMoeBlock():
                return self.mlp(hidden_states)
            case Mlp():
                return self.mlp(hidden_states), None


def _mixer(config: LayerConfig, decoder: DecoderConfig) -> GroupedQueryAttentionLayer | LatentAttentionLayer:
    match config.mixer:
        case GroupedQueryAttention():
            return GroupedQueryAttentionLayer(config.mixer, decoder.hidden_size, decoder.norm)
        case LatentAttention():
            return LatentAttentionLayer(config.mixer, decoder.hidden_size)


def _window(mixer: Mixer) -> int | None:
    match mixer:
        case GroupedQueryAttention():
            return mixer.sliding_window
        case LatentAttention():
            return None


def _feed_forward(config: LayerConfig, decoder: DecoderConfig, make_experts: MakeExperts) -> Mlp | SparseMoeBlock:
    match config.feed_forward:
        case DenseMlp():
            return Mlp(config.feed_forward, decoder.hidden_size)
        case SparseMoe():
            return SparseMoeBlock(config.feed_forward, decoder.hidden_size, make_experts=make_experts)


class DecoderStack(nn.Module):
    """Everything below the head: token ids to normalised hidden states."""

    def __init__(self, config: DecoderConfig, *, make_experts: MakeExperts) -> None:
        super().__init__()
        self.ropes: tuple[Rope, ...] = tuple(layer.mixer.rope for layer in config.layers)
        self.windows: tuple[int | None, ...] = tuple(_window(layer.mixer) for layer in config.layers)
        # by nn.Embedding(...) the table would be filled with noise, which on meta imports torch's compiler: 4 seconds
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(DecoderLayer(layer, config, make_experts=make_experts) for layer in config.layers)
        self.norm = RmsNormLayer(config.norm, config.hidden_size)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, tuple[RouterChoice, ...]]:
        """As `Decoder.forward`: hidden_states [B, T, H] after the final norm, and the choices of the sparse layers."""
        hidden_states = self.embed_tokens(input_ids)
        past, tokens = 0 if cache is None else cache.length, input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(past, past + tokens, device=input_ids.device).unsqueeze(0)
        rotary = {rope: rotary_tables(rope, position_ids, hidden_states.dtype) for rope in set(self.ropes)}
        masks = causal_masks(set(self.windows), attention_mask, tokens, past, hidden_states)
        devices = self.layer_devices
        tables = {device: _moved(rotary, masks, device) for device in set(devices)}
        choices: list[RouterChoice] = []
        for number, (layer, device) in enumerate(zip(self.layers, devices, strict=True)):
            rotary, masks = tables[device]
            table, mask = rotary[self.ropes[number]], masks[self.windows[number]]
            layer_cache = None if cache is None else cache.layers[number]
            hidden_states, choice = layer(hidden_states.to(device), table, mask, layer_cache)
            choices += [] if choice is None else [choice]
        if cache is not None:
            cache.advance(tokens)
        return self.norm(hidden_states.to(self.norm.weight.device)), tuple(choices)

    @property
    def layer_devices(self) -> tuple[torch.device, ...]:
        """Where each layer is, which need not be where the one before it is."""
        layers = cast(Iterable[DecoderLayer], self.layers)
        return tuple(layer.input_layernorm.weight.device for layer in layers)


Rotary = Mapping[Rope, RotaryTables]
Masks = Mapping[int | None, Tensor | None]


def _moved(rotary: Rotary, masks: Masks, device: torch.device) -> tuple[Rotary, Masks]:
    """What layers share, on a device: the very same where it is there."""
    tables = {rope: (cos.to(device), sin.to(device)) for rope, (cos, sin) in rotary.items()}
    return tables, {window: None if mask is None else mask.to(device) for window, mask in masks.items()}


class Decoder(nn.Module):
    """A causal language model, built from a DecoderConfig alone; its parameters are not initialised.

    Parameters have the hub's names, experts packed (`moebius.experts.contract`).  Under `torch.device("meta")` it costs
    no memory.  experts_implementation: a name in ALL_EXPERTS_FUNCTIONS, or "auto".  experts_class: what makes the
    routed experts of a layer, called as Experts is.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        experts_implementation: str = AUTO,
        experts_class: Callable[..., Experts] = Experts,
    ) -> None:
        super().__init__()
        self.config = config
        make_experts = partial(experts_class, experts_implementation=experts_implementation)
        self.model = DecoderStack(config, make_experts=make_experts)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        logits_to_keep: int = 0,
        output_router_logits: bool | None = None,
    ) -> CausalLMOutput:
        """Logits of the next token, and the losses.

        input_ids: [B, T] int64.  attention_mask: [B, P+T], 1 real and 0 padding; None means all real.
        labels: [B, T] int64, shifted here; -100 is left out.  Left out should be, too, the first token after left
        padding: what would predict it is padding, whose logits mean nothing.
        position_ids: [B, T]; default P, P+1, ...
        cache: read, appended to and advanced.  logits_to_keep: only the last so many positions; 0 means all.
        output_router_logits: also give router_logits and aux_loss, and add the latter times router_aux_loss_coef to the
        loss; default: the config's.  ArgumentError: shapes that do not fit together.
        Where layers are on several devices, states go from one to the next; what is given and what comes back is on the
        embedding's.
        """
        _check_arguments(input_ids, attention_mask, labels, position_ids, cache, logits_to_keep)
        hidden_states, choices = self.model(input_ids, attention_mask, position_ids=position_ids, cache=cache)
        home = input_ids.device
        logits = self.lm_head(hidden_states[:, -logits_to_keep:].to(self.lm_head.weight.device))
        loss = None if labels is None else causal_loss(logits, labels.to(logits.device)).to(home)
        wanted = self.config.output_router_logits if output_router_logits is None else output_router_logits
        if not wanted:
            return CausalLMOutput(loss, logits.to(home))
        router_logits = tuple(choice.router_logits.to(home) for choice in choices)
        aux_loss = self._aux_loss(router_logits, attention_mask, input_ids.shape[1])
        if loss is not None and aux_loss is not None:
            loss = loss + self.config.router_aux_loss_coef * aux_loss
        return CausalLMOutput(loss, logits.to(home), aux_loss, router_logits)

    def _aux_loss(self, router_logits: tuple[Tensor, ...], mask: Tensor | None, tokens: int) -> Tensor | None:
        if not router_logits:
            return None
        return load_balancing_loss(
            router_logits, self.config.moe_layers[0].top_k, None if mask is None else mask[:, -tokens:]
        )

    def tie_weights(self) -> None:
        """Make the head's weight the embedding's Parameter, if the config says so; for whoever replaces one of them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def parameter_roles(self) -> dict[str, Role]:
        """The role of each parameter, by name, in order; a tied head is the embedding's.  Works on meta."""
        return parameter_roles(self)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fill every parameter: normal with the config's initializer_range, norms one, biases zero; buffers zero."""
        roles = self.parameter_roles()
        for name, parameter in self.named_parameters():
            if roles[name] == "norm":
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(0.0, self.config.initializer_range, generator=generator)
        for buffer in self.buffers():
            buffer.zero_()

    def experts_backend(self, device_type: str) -> str | None:
        """The backend that runs the routed experts on such a device; None for a dense model.

        BackendError: the one that was named cannot.
        """
        dtype = self.model.embed_tokens.weight.dtype
        names = [module.choice(device_type, dtype).name for module in self.modules() if isinstance(module, Experts)]
        return names[0] if names else None

    def experts_report(self, *, training: bool = False) -> dict[str, Choice]:
        """What runs the routed experts of each layer where it is now, and why: {module's name: (backend, reason)}.

        training: with a backward to follow.  BackendError: the one that was named cannot.
        """
        dtype = self.model.embed_tokens.weight.dtype
        layers = {name: module for name, module in self.named_modules() if isinstance(module, Experts)}
        return {
            name: experts.choice(experts.gate_up_proj.device, dtype, needs_grad=training)
            for name, experts in layers.items()
        }

    def set_experts_implementation(self, name: str) -> None:
        """Run all routed experts by this backend from now on.  BackendError: unknown name."""
        for module in self.modules():
            if isinstance(module, Experts):
                module.set_experts_implementation(name)


def causal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits [B, T, V] at t against labels [B, T] at t + 1, in float32; -100 is left out."""
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED_LABEL)


def _check_arguments(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    position_ids: Tensor | None,
    cache: Cache | None,
    logits_to_keep: int,
) -> None:
    if input_ids.dim() != 2:
        raise ArgumentError(f"input_ids: expected shape [batch, tokens], found {list(input_ids.shape)}")
    batch, tokens = input_ids.shape
    known = tokens + (0 if cache is None else cache.length)
    faults = [
        *_shape_faults("attention_mask", attention_mask, [(batch, known)]),
        *_shape_faults("labels", labels, [(batch, tokens)]),
        *_shape_faults("position_ids", position_ids, [(batch, tokens), (1, tokens)]),
    ]
    if logits_to_keep < 0 or (logits_to_keep and labels is not None):
        faults.append(Fault("logits_to_keep", "unsupported", f"{logits_to_keep}; with labels it has to be 0"))
    if faults:
        raise ArgumentError(f"the arguments do not fit input_ids {list(input_ids.shape)}", faults=faults)


def _shape_faults(name: str, tensor: Tensor | None, allowed: list[tuple[int, ...]]) -> list[Fault]:
    if tensor is None or tuple(tensor.shape) in allowed:
        return []
    return [Fault(name, "shape", f"expected {list(allowed[0])}, found {list(tensor.shape)}")]
