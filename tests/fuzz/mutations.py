"""Every damage by its name, under which a case replays."""

import random
from collections.abc import Callable, Mapping

from tests.fuzz import damaged_configs, damaged_files, damaged_tensors
from tests.fuzz.documents import Files
from tests.fuzz.harmless import HARMLESS
from tests.fuzz.oddities import Names

Mutation = Callable[[random.Random, Files], Names]

DAMAGES: Mapping[str, Mutation] = {
    mutation.__name__: mutation
    for mutation in (
        damaged_files.any_bytes,
        damaged_files.impostor,
        damaged_files.not_a_file,
        damaged_files.file_missing,
        damaged_files.second_set,
        damaged_files.header_length,
        damaged_files.header_document,
        damaged_files.header_dtype,
        damaged_files.header_shape,
        damaged_files.header_offsets,
        damaged_files.header_swap,
        damaged_files.index_document,
        damaged_files.index_place,
        damaged_tensors.tensor_removed,
        damaged_tensors.tensor_renamed,
        damaged_tensors.tensor_added,
        damaged_tensors.tensor_in_two_shards,
        damaged_tensors.tensors_swapped,
        damaged_tensors.tensor_cast,
        damaged_tensors.tensor_reshaped,
        damaged_tensors.all_cast,
        damaged_tensors.data_bits,
        damaged_tensors.bytes_shared,
        damaged_tensors.bytes_between,
        damaged_configs.config_document,
        damaged_configs.config_number,
        damaged_configs.config_form,
        damaged_configs.config_type,
        damaged_configs.config_field,
    )
}
OF_SEVERAL_SHARDS = {"index_document", "index_place", "tensor_in_two_shards", "reordered_index", "other_index_fields"}
MUTATIONS: Mapping[str, Mutation] = {**DAMAGES, **HARMLESS}
