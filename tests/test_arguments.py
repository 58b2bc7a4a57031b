"""What from_pretrained's arguments mean, by themselves: distributed_config in other spellings, devices on ranks."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from moebius import ArgumentError
from moebius.arguments import device_type_on_ranks, distributed_config_of
from moebius.distributed.config import DistributedConfig


@dataclass
class Theirs:
    """transformers' object, as far as it is read; set to what its own checks may let through."""

    enable_expert_parallel: Any = False
    ep_size: Any = 1
    fsdp_size: Any = 1
    tp_size: int = 1
    dp_replicate_size: int = 1


@pytest.mark.parametrize(
    "fields", [{"ep_size": "2"}, {"ep_size": True}, {"ep_size": 1.0}, {"fsdp_size": "2"}, {"fsdp_size": True}], ids=str
)
@pytest.mark.parametrize("spelling", [dict, Theirs], ids=["dict", "object"])
def test_a_value_of_the_wrong_type_is_refused_in_every_spelling(spelling, fields):
    with pytest.raises(ArgumentError) as refused:
        distributed_config_of(spelling(**fields))
    assert [(fault.where, fault.what) for fault in refused.value.faults] == [(*fields, "type")]


@pytest.mark.parametrize("spelling", [dict, Theirs], ids=["dict", "object"])
def test_a_word_is_no_flag_in_any_spelling(spelling):
    with pytest.raises(ArgumentError, match="enable_expert_parallel: type: expected True or False, found 'no'"):
        distributed_config_of(spelling(enable_expert_parallel="no"))


def test_unknown_fields_and_wrong_values_are_said_at_once():
    with pytest.raises(ArgumentError) as refused:
        distributed_config_of({"ep_size": "2", "tp_size": 2, "exchange": "all2all", "ep_sise": 1, 3: 4})
    assert [fault.where for fault in refused.value.faults] == ["tp_size=2", "ep_sise", "3", "ep_size", "exchange"]


def test_an_object_that_names_fewer_fields_is_taken():
    assert distributed_config_of(Theirs(ep_size=2, fsdp_size=4)) == DistributedConfig(
        ep_size=2, fsdp_size=4, dp_replicate_size=1, batch="distinct"
    )


@pytest.mark.parametrize(
    ("device_map", "kind"),
    [(None, None), ("auto", None), ("cpu", "cpu"), ("cuda", "cuda"), (torch.device("cpu"), "cpu")],
    ids=str,
)
def test_where_ranks_have_devices_of_their_own_a_device_map_may_name_the_kind(device_map, kind):
    assert device_type_on_ranks(device_map, None) == kind


@pytest.mark.parametrize("device_map", ["cuda:0", 0, "meta", "balanced", {"": "cpu"}, torch.device("cuda:1")], ids=str)
def test_a_device_map_that_names_more_is_refused_on_ranks(device_map):
    with pytest.raises(ArgumentError, match="expected None, 'auto', 'cpu' or 'cuda': each rank takes"):
        device_type_on_ranks(device_map, None)


def test_limits_are_refused_on_ranks_beside_a_device_map():
    with pytest.raises(ArgumentError) as refused:
        device_type_on_ranks("meta", {"cpu": "1GB"})
    assert [fault.where for fault in refused.value.faults] == ["device_map='meta'", "max_memory={'cpu': '1GB'}"]
