"""nearest_ is round_ by addition."""

import torch

from moebius.quantization.rounding import nearest_


def test_it_gives_what_round_gives_ties_and_what_is_not_finite_included():
    ties = torch.arange(-300, 300) + 0.5
    beside = [torch.nextafter(ties, torch.full_like(ties, end)) for end in (-1e9, 1e9)]
    numbers = torch.cat([ties, *beside, torch.randn(10_000) * 200, torch.tensor([0.0, 2.0**22 - 0.5, 1e-30])])
    assert torch.equal(nearest_(numbers.clone()), numbers.round())
    extremes = torch.tensor([torch.inf, -torch.inf, torch.nan])
    assert torch.equal(nearest_(extremes.clone()).nan_to_num(7), extremes.nan_to_num(7))
