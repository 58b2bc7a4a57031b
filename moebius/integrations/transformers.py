"""Our experts backends inside unmodified transformers models: `register()`, then experts_implementation="moebius".

T tokens, K experts a token, H hidden.
"""

from weakref import WeakKeyDictionary

from torch import Tensor, nn

from moebius.errors import BackendError, Fault
from moebius.experts.interface import ALL_EXPERTS_FUNCTIONS, AUTO
from moebius.integrations.expert_layers import ComposedExperts, MappedExperts
from moebius.integrations.expert_variants import variant_of

PREFIX = "moebius"


def register() -> list[str]:
    """Add our backends to transformers' registries of experts, of plain and of fp8 models, and return their names.

    "moebius" chooses for each layer, as "auto" does; "moebius_" before a name of ALL_EXPERTS_FUNCTIONS is that backend
    alone, refused where it cannot run.  Backends that are registered later need another call.
    """
    from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
    from transformers.integrations.moe import ExpertsInterface

    backends = {PREFIX: AUTO, **{f"{PREFIX}_{name}": name for name in ALL_EXPERTS_FUNCTIONS}}
    for name, backend in backends.items():
        function = TransformersBackend(backend)
        ExpertsInterface.register(name, function)
        FP8ExpertsInterface.register(name, function)
    return list(backends)


class TransformersBackend:
    """What transformers calls in the place of an experts layer's own forward.

    Looks at each layer once, at its first call; layers are known by identity, and held weakly.
    """

    def __init__(self, backend: str):
        self._backend = backend
        self._layers: WeakKeyDictionary[nn.Module, MappedExperts | ComposedExperts] = WeakKeyDictionary()

    def __call__(self, module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H], [T, K], [T, K] -> [T, H].  BackendError: the layer's variant, or the backend on it, is refused."""
        if module not in self._layers:
            self._layers[module] = _adapted(module, self._backend)
        return self._layers[module](hidden_states, top_k_index, top_k_weights)


def _adapted(module: nn.Module, backend: str) -> MappedExperts | ComposedExperts:
    """The layer as one of our experts; if it is none, and any backend will do, in its own steps."""
    variant = variant_of(module)
    obstacles = variant.obstacles
    if not obstacles:
        return MappedExperts(module, variant, backend)
    if backend in (AUTO, "grouped_mm") and variant.form is None:
        return ComposedExperts(module, variant, obstacles)
    raise BackendError(
        f"{type(module).__name__} cannot run in experts_implementation={backend!r} of Moebius",
        faults=[Fault(type(module).__name__, "refused", obstacle) for obstacle in obstacles],
        advice="take one of transformers' own" if variant.form else f'take "{PREFIX}", which runs its steps one by one',
    )
