"""What may be asked of quantization, and what is refused by name."""

import pytest

from moebius.errors import ArgumentError
from moebius.quantization.config import QuantizationConfig
from moebius.quantization.forms import BlockFp8, Int8, Mxfp4, PackedInt4


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({"form": "int8"}, Int8()),
        ({"form": "int4"}, PackedInt4(32)),
        ({"form": "int4", "group_size": 64}, PackedInt4(64)),
        ({"form": "fp8"}, BlockFp8((128, 128))),
        ({"form": "fp8", "block": [64, 32]}, BlockFp8((64, 32))),
        ({"form": "mxfp4"}, Mxfp4()),
    ],
)
def test_a_name_and_its_options_say_the_form(fields, form):
    assert QuantizationConfig.from_dict(fields).weight_form == form


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"form": "int3"}, "form='int3'"),
        ({}, "form: missing"),
        ({"form": "int4", "groupsize": 32}, "did you mean group_size"),
        ({"form": "int8", "group_size": 32}, "group_size=32"),
        ({"form": "int4", "group_size": 12}, "group_size=12"),
        ({"form": "fp8", "block": [128]}, r"block=\(128,\)"),
        ({"form": "fp8", "block": 128}, "block=128"),
        ({"form": "int4", "parts": ["routers"]}, "parts="),
        ({"form": "int4", "parts": []}, "parts="),
        ({"form": "int4", "modules_to_not_convert": "lm_head"}, "modules_to_not_convert='lm_head'"),
    ],
)
def test_what_means_nothing_is_refused_by_name(fields, told):
    with pytest.raises(ArgumentError, match=told):
        QuantizationConfig.from_dict(fields)


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(ArgumentError) as caught:
        QuantizationConfig("int8", group_size=3, block=(1, 2), parts=("x",))
    assert len(caught.value.faults) == 3
