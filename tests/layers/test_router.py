"""Every routing chooses and weighs as it is written down; the balancing loss is the Switch Transformer's.

T tokens, K experts a token, E experts.
"""

import math
from collections.abc import Callable

import pytest
import torch

from moebius.config import Routing, SigmoidTopK, SoftmaxGroupTopK, SoftmaxTopK, SparseMoe, TopKSoftmax
from moebius.errors import ConfigError
from moebius.layers.router import Router, RouterChoice, load_balancing_loss


def router(**routing: bool) -> Router:
    made = Router(SparseMoe(6, 2, 8, SoftmaxTopK(**routing)), 16)
    with torch.no_grad():
        made.weight.normal_(generator=torch.Generator().manual_seed(0))
    return made


def test_the_chosen_are_the_likeliest_with_their_probabilities():
    choice = router(renormalize=False)(torch.randn(5, 16))
    probabilities = choice.router_logits.softmax(-1)
    assert choice.top_k_index.dtype == torch.int64
    torch.testing.assert_close(probabilities.gather(1, choice.top_k_index), choice.top_k_weights)
    assert (choice.top_k_weights.min(-1).values >= probabilities.sort().values[:, -2]).all()


@pytest.mark.parametrize("renormalize", [True, False])
def test_weights_sum_to_one_only_if_renormalised(renormalize):
    sums = router(renormalize=renormalize)(torch.randn(5, 16)).top_k_weights.sum(-1)
    assert torch.allclose(sums, torch.ones(5)) == renormalize


@pytest.mark.parametrize(("float32_weights", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_weights_stay_float32_only_if_asked(float32_weights, dtype):
    made = router(renormalize=True, float32_weights=float32_weights).bfloat16()
    assert made(torch.randn(5, 16).bfloat16()).top_k_weights.dtype == dtype


EXPERTS, TOP_K, HIDDEN = 16, 4, 32
ROUTINGS = {
    "renormalised": SoftmaxTopK(renormalize=True),
    "not renormalised": SoftmaxTopK(renormalize=False),
    "softmax of the top k": TopKSoftmax(),
    "greedy": SoftmaxGroupTopK(scale=1.5),
    "groups by their largest": SoftmaxGroupTopK(num_groups=4, top_groups=2, scale=16.0),
    "sigmoid": SigmoidTopK(renormalize=True, epsilon=0.0, float32_gate=True),
    "sigmoid, in groups": SigmoidTopK(renormalize=True, num_groups=4, top_groups=2, scale=2.5),
    "sigmoid, in groups, not renormalised": SigmoidTopK(renormalize=False, num_groups=8, top_groups=3, scale=2.5),
    "sigmoid, with an epsilon that shows": SigmoidTopK(renormalize=True, epsilon=0.5),
}


def made(routing: Routing, dtype: torch.dtype = torch.float32) -> Router:
    """Of random weights, biases and correction biases, in the model's dtype."""
    router = Router(SparseMoe(EXPERTS, TOP_K, 8, routing), HIDDEN)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_(std=0.3)
        for buffer in router.buffers():
            buffer.normal_(std=0.2)
    return router.to(dtype)


def by_expert(choice) -> torch.Tensor:
    """[T, E]: each expert's weight, NaN where it was not chosen."""
    weights = torch.full(choice.router_logits.shape, torch.nan, dtype=choice.top_k_weights.dtype)
    return weights.scatter(1, choice.top_k_index, choice.top_k_weights)


def written_down(routing: Routing, logits: list[float], correction: list[float]) -> dict[int, float]:
    """One token's experts and their weights."""
    match routing:
        case SoftmaxTopK(renormalize):
            chosen = best(TOP_K, softmax(logits))
            total = sum(chosen.values()) if renormalize else 1.0
            return {expert: weight / total for expert, weight in chosen.items()}
        case TopKSoftmax():
            chosen = best(TOP_K, dict(enumerate(logits)))
            return dict(zip(chosen, softmax(list(chosen.values())).values(), strict=True))
        case SoftmaxGroupTopK(num_groups, top_groups, scale):
            scores = softmax(logits)
            kept = in_best_groups(scores, num_groups, top_groups, max)
            return {expert: weight * scale for expert, weight in best(TOP_K, kept).items()}
        case SigmoidTopK(renormalize, num_groups, top_groups, scale, epsilon):
            scores = [1 / (1 + math.exp(-logit)) for logit in logits]
            corrected = {expert: score + correction[expert] for expert, score in enumerate(scores)}
            kept = in_best_groups(corrected, num_groups, top_groups, lambda group: sum(sorted(group)[-2:]))
            chosen = {expert: scores[expert] for expert in best(TOP_K, kept)}
            total = sum(chosen.values()) + epsilon if renormalize else 1.0
            return {expert: weight / total * scale for expert, weight in chosen.items()}


def softmax(logits: list[float]) -> dict[int, float]:
    total = sum(map(math.exp, logits))
    return {index: math.exp(logit) / total for index, logit in enumerate(logits)}


def best(count: int, scores: dict[int, float]) -> dict[int, float]:
    return dict(sorted(scores.items(), key=lambda item: -item[1])[:count])


def in_best_groups(scores: dict[int, float], groups: int, kept: int, worth: Callable) -> dict[int, float]:
    size = len(scores) // groups
    worths = {group: worth([scores[group * size + i] for i in range(size)]) for group in range(groups)}
    return {expert: score for expert, score in scores.items() if expert // size in best(kept, worths)}


@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_experts_and_weights_are_as_written_down(routing):
    router = made(routing)
    choice = router(torch.randn(50, HIDDEN))
    correction = dict(router.named_buffers()).get("e_score_correction_bias", torch.zeros(EXPERTS)).tolist()
    found = by_expert(choice)
    for token, logits in enumerate(choice.router_logits.tolist()):
        expected = written_down(routing, logits, correction)
        weights = {expert: found[token, expert].item() for expert in range(EXPERTS) if not found[token, expert].isnan()}
        assert weights == pytest.approx(expected, rel=1e-5)


def gpt_oss(routing: TopKSoftmax):
    from transformers.models.gpt_oss import modeling_gpt_oss as module

    config = module.GptOssConfig(hidden_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K)
    return module.GptOssTopKRouter(config)


def deepseek_v2(routing: SoftmaxGroupTopK):
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as module

    method = "group_limited_greedy" if routing.num_groups > 1 else "greedy"
    return module.DeepseekV2TopkRouter(module.DeepseekV2Config(**grouped(routing), topk_method=method))


def deepseek_v3(routing: SigmoidTopK):
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as module

    config = module.DeepseekV3Config(**grouped(routing), norm_topk_prob=routing.renormalize)
    return module.DeepseekV3TopkRouter(config)


def glm4_moe(routing: SigmoidTopK):
    from transformers.models.glm4_moe import modeling_glm4_moe as module

    config = module.Glm4MoeConfig(**grouped(routing), norm_topk_prob=routing.renormalize)
    return module.Glm4MoeTopkRouter(config)


def minimax_m2(routing: SigmoidTopK):
    from transformers.models.minimax_m2 import modeling_minimax_m2 as module

    config = module.MiniMaxM2Config(hidden_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K)
    return module.MiniMaxM2TopKRouter(config)


def grouped(routing: SoftmaxGroupTopK | SigmoidTopK) -> dict[str, object]:
    return {
        "hidden_size": HIDDEN,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "n_group": routing.num_groups,
        "topk_group": routing.top_groups,
        "routed_scaling_factor": routing.scale,
    }


ORACLES = [
    (gpt_oss, TopKSoftmax()),
    (deepseek_v2, SoftmaxGroupTopK(scale=1.0)),
    (deepseek_v2, SoftmaxGroupTopK(num_groups=4, top_groups=2, scale=16.0)),
    (deepseek_v3, SigmoidTopK(renormalize=True, num_groups=4, top_groups=2, scale=2.5)),
    (deepseek_v3, SigmoidTopK(renormalize=False, num_groups=8, top_groups=3, scale=2.5)),
    (glm4_moe, SigmoidTopK(renormalize=True, scale=2.5)),
    (minimax_m2, SigmoidTopK(renormalize=True, epsilon=0.0, float32_gate=True)),
]


@pytest.mark.parametrize(("oracle_of", "routing"), ORACLES, ids=lambda each: getattr(each, "__name__", repr(each)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_and_weights_are_those_of_transformers(oracle_of, routing, dtype):
    router, oracle = made(routing, dtype), oracle_of(routing)
    with torch.no_grad():
        for name, tensor in router.named_parameters():
            oracle.get_parameter(name).data = tensor.detach().clone()
    states = torch.randn(200, HIDDEN).to(dtype)
    if oracle_of is minimax_m2:
        logits, weights, index = oracle(states, router.e_score_correction_bias)
    else:
        for name, buffer in router.named_buffers():
            oracle.get_buffer(name).copy_(buffer)
        logits, weights, index = oracle(states)
    choice = router(states)
    assert torch.equal(choice.router_logits, logits)
    assert choice.top_k_weights.dtype == weights.dtype
    torch.testing.assert_close(by_expert(choice), by_expert(RouterChoice(logits, weights, index)), equal_nan=True)


def test_the_correction_moves_the_choice_and_not_the_weights():
    router = made(SigmoidTopK(renormalize=False))
    router.e_score_correction_bias.zero_()
    router.e_score_correction_bias[5] = 12.0  # so large that a score added to it and taken off again is lost
    choice = router(torch.randn(20, HIDDEN))
    found = by_expert(choice)[:, 5]
    torch.testing.assert_close(found, choice.router_logits.sigmoid()[:, 5])


def test_experts_outside_of_the_best_groups_are_not_chosen_even_if_all_corrected_scores_are_negative():
    router = made(SigmoidTopK(renormalize=True, num_groups=4, top_groups=1))
    router.e_score_correction_bias.sub_(5.0)
    groups = router(torch.randn(20, HIDDEN)).top_k_index // 4
    assert torch.equal(groups, groups[:, :1].expand_as(groups))


def test_a_correction_is_told_apart_where_bfloat16_could_not():
    """Released corrections lie within 0.25 of each other around 7."""
    router = made(SigmoidTopK(renormalize=True), torch.bfloat16)
    assert router.e_score_correction_bias.dtype == torch.float32
    router.e_score_correction_bias.fill_(7.0).add_(torch.arange(EXPERTS) * 1e-3)
    choice = router(torch.zeros(1, HIDDEN).bfloat16())
    assert set(choice.top_k_index[0].tolist()) == {12, 13, 14, 15}


@pytest.mark.parametrize("cast", [lambda r: r.to(torch.bfloat16), lambda r: r.half(), lambda r: r.bfloat16()])
def test_what_is_float32_in_every_model_stays_so(cast):
    gate = cast(made(SigmoidTopK(renormalize=True, float32_gate=True)))
    assert gate.weight.dtype == gate.e_score_correction_bias.dtype == torch.float32
    plain = cast(made(SigmoidTopK(renormalize=True)))
    assert plain.weight.dtype != plain.e_score_correction_bias.dtype == torch.float32


def test_what_is_float32_is_made_so_in_a_model_of_another_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            gate = Router(SparseMoe(EXPERTS, TOP_K, 8, SigmoidTopK(renormalize=True, float32_gate=True)), HIDDEN)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {tensor.dtype for tensor in gate.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("name", ["greedy", "groups by their largest", "sigmoid", "sigmoid, in groups"])
def test_float32_routing_is_float32_under_autocast(name):
    router, states = made(ROUTINGS[name]), torch.randn(20, HIDDEN)
    with torch.autocast("cpu", torch.bfloat16):
        inside = router(states)
    assert all(torch.equal(*pair) for pair in zip(inside, router(states), strict=True))


@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_the_weights_teach_the_gate(routing):
    router = made(routing)
    choice = router(torch.randn(20, HIDDEN))
    (choice.top_k_weights * torch.rand(20, TOP_K)).sum().backward()
    for parameter in router.parameters():
        assert parameter.grad is not None
        assert parameter.grad.ne(0).any()


@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_a_router_keeps_what_its_routing_needs_and_no_more(routing):
    kinds = {TopKSoftmax: {"weight", "bias"}, SigmoidTopK: {"weight", "e_score_correction_bias"}}
    assert set(made(routing).state_dict()) == kinds.get(type(routing), {"weight"})


@pytest.mark.parametrize(("groups", "kept"), [(3, 1), (4, 5), (8, 1)])
@pytest.mark.parametrize("kind", [SoftmaxGroupTopK, lambda groups, kept: SigmoidTopK(True, groups, kept)])
def test_groups_that_cannot_be_are_refused(kind, groups, kept):
    with pytest.raises(ConfigError, match=f"4 experts out of {kept} of {groups} equal groups of 16"):
        Router(SparseMoe(EXPERTS, TOP_K, 8, kind(groups, kept)), HIDDEN)


def test_perfect_balance_gives_k_and_collapse_gives_more():
    balanced = torch.eye(4).repeat(3, 1) * 50
    assert load_balancing_loss([balanced], top_k=1) == pytest.approx(1.0)
    collapsed = torch.tensor([[50.0, 0, 0, 0]]).repeat(12, 1)
    assert load_balancing_loss([collapsed], top_k=1) == pytest.approx(4.0)


def test_layers_are_pooled_before_the_product():
    one, two = (torch.eye(4)[[e]].repeat(12, 1) * 50 for e in (0, 1))
    assert load_balancing_loss([one, two], top_k=1) == pytest.approx(2.0)


def test_padding_is_left_out():
    logits = torch.randn(2, 6, 4)
    mask = torch.ones(2, 6)
    mask[0, :4] = 0
    real = [logits[mask.bool()]]
    found = load_balancing_loss([logits.flatten(0, 1)], 2, mask)
    torch.testing.assert_close(found, load_balancing_loss(real, 2))
