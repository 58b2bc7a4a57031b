"""A damaged checkpoint is refused by name before a weight is read, or what was damaged proves harmless."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from moebius import AutoModelForCausalLM, CheckpointError, ConfigError, MoebiusError, checkpoint
from moebius.checkpoint import checksums, loading
from moebius.errors import SHOWN_FAULTS
from tests.checkpoint import editing, faults
from tests.checkpoint.editing import INDEX
from tests.checkpoint.faults import DOWN, FAULTS, NORM, NamedFault

LOADED = {"5", "18", "24"}
REFUSED = [fault for fault in FAULTS if fault.number not in LOADED]
CONFIG_FAULTS = {"29", "30a", "30b"}

# What a message says beside the names: expected and found, or what stands there and how to come by the right thing.
SAID = {
    "1": ["truncated", "132,512 bytes expected", "has 132,412", "fetch it again"],
    "2": ["truncated", "bytes expected for the header", "has 200", "fetch it again"],
    "3": ["truncated", "8 bytes expected", "has 0", "fetch it again"],
    "4": ["missing", f"{INDEX} says that it holds", "experts.0.up_proj.weight", "fetch it"],
    "6": ["damaged header", "broken JSON", "fetch it again"],
    "7": ["4,611,686,018,427,387,904 bytes", "limit is 100,000,000"],
    "8": ["HTML page", "login"],
    "9": ["git-lfs pointer", "git lfs pull"],
    "10": ["expected *.safetensors inside the folder"],
    "11": ["expected *.safetensors inside the folder"],
    "12": ["a link out of the folder", "outside/model-00001-of-00004.safetensors", "expected a file inside"],
    "13": ["disagree", "says model-00001-of-00004.safetensors", "is in model-00002-of-00004.safetensors"],
    "14": ["disagree", "says nothing of it"],
    "15": ["broken JSON", "line", "fetch it again"],
    "16": ["expected an object from tensor names to shard file names"],
    "17": ["missing", "[64, 32] float32", "ids found: 0-1, 3", "the model holds 0-3"],
    "19": ["shape", "expected [64, 32]", "found [63, 32] float32"],
    "20": ["shape", "expected [64]", "found [63] float32"],
    "21": ["dtype", "found float16", "siblings are float32"],
    "22": ["dtype", "found int8", "siblings are float32"],
    "23": ["extra index", "ids found: 0-3, 9", "the model holds 0-3"],
    "25": ["missing: 12 names", "model.layers.2.self_attn.q_proj.weight: expected [128, 64]"],
    "26": ["unexpected: 21 names", f"{NORM}: in model-00002-of-00004.safetensors"],
    "27": ["gap", "expected [32, 64] float32", "ids found: 0-3", "the model holds 0-7"],
    "28": ["extra index", "ids found: 0-3", "the model holds 0-1"],
    "29": ["5 experts a token", "num_experts is 4"],
    "30a": ["expected a whole number from 1", "found -1"],
    "30b": ["expected a whole number from 1", "found 'x'"],
    "31": ["stands twice"],
    "32": ["in two shards"],
    "33a": ["bytes overlap", "begins at byte 124408", "ends at 124424"],
    "33b": ["bytes leave a gap", "begins at byte 124440", "ends at 124424"],
    "34a": ["missing: 3 names", "extra index", "ids found: 0-2, 4", "the model holds 0-3"],
    "34b": ["missing: 3 names", "extra index", "ids found: 0, 2-4", "the model holds 0-3"],
    "35": ["missing", "ids found: none", "the model holds 0-3"],
    "36": ["two layouts at once", "model-00001-of-00004.safetensors"],
    "37": ["a pickled PyTorch file", "never opened", "save_pretrained()"],
}


@pytest.fixture(scope="session")
def clean(tmp_path_factory) -> Path:
    return faults.make_clean(tmp_path_factory.mktemp("faults") / "clean")


@pytest.fixture
def folder(clean, tmp_path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(clean, tmp_path / "model"))


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test when weights begin to be read."""

    def load(*args, **options):
        raise AssertionError("weights are being read")

    monkeypatch.setattr(loading, "load", load)


def named(number: str) -> NamedFault:
    return next(fault for fault in FAULTS if fault.number == number)


def refusal(folder: str | Path, kind: type[MoebiusError] = CheckpointError, **options) -> str:
    """What from_pretrained says when it refuses; the kind of error is exact, and the text as short as it can be."""
    with pytest.raises(MoebiusError) as raised:
        AutoModelForCausalLM.from_pretrained(folder, **options)
    assert type(raised.value) is kind
    text = str(raised.value)
    check_style(text, len(raised.value.faults))
    return text


def check_style(text: str, count: int) -> None:
    """One line and at most one more with advice; with several faults one line each; nothing that only Python says."""
    lines = text.splitlines()
    assert lines[-1].startswith("what to do: ") or len(lines) == 1 or count > 1
    assert len(lines) <= (2 if count < 2 else 2 + min(count, SHOWN_FAULTS + 1))
    assert max(map(len, lines)) < 500
    assert not re.search(
        r"Traceback|Errno|Error\(|Fault\(|<[\w.]+ |\bb'|PosixPath|dict_|defaultdict|\bNone\b|\{'\w", text
    )


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    return model(torch.arange(24)[None]).logits


def test_the_corpus_holds_the_37_faults():
    assert {int(re.sub("[ab]", "", fault.number)) for fault in FAULTS} == set(range(1, 38))
    assert {fault.number for fault in FAULTS} == SAID.keys() | LOADED


def test_without_a_fault_the_checkpoint_loads(folder):
    assert len(list(folder.glob("*.safetensors"))) == 4
    assert logits(folder).isfinite().all()


@pytest.mark.parametrize("fault", REFUSED, ids=lambda fault: fault.number)
def test_a_fault_is_refused_by_name_before_a_weight_is_read(fault, folder, no_weights):
    names = fault.damage(folder)
    text = refusal(folder, ConfigError if fault.number in CONFIG_FAULTS else CheckpointError)
    assert [words for words in (*names, *SAID[fault.number]) if words not in text] == []


@pytest.mark.parametrize("fault", REFUSED, ids=lambda fault: fault.number)
def test_a_fault_is_refused_on_the_meta_device_too(fault, folder):
    fault.damage(folder)
    with pytest.raises((CheckpointError, ConfigError)):
        AutoModelForCausalLM.from_pretrained(folder, device_map="meta")


def test_headers_without_metadata_change_nothing(folder):
    before = logits(folder)
    named("24").damage(folder)
    assert torch.equal(logits(folder), before)


def test_a_bit_flipped_in_the_data_is_not_seen_without_checksums(folder):
    """Such a fault loads and changes what the model says."""
    before = logits(folder)
    named("5").damage(folder)
    assert not torch.allclose(logits(folder), before, atol=1e-3)


def test_a_bit_flipped_in_the_data_is_found_by_checksums(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    checkpoint.save(model.plan, dict(model.named_parameters()), folder, checksums=True)
    assert checksums.check(checkpoint.open_files(folder), threads=0) == []
    named("5").damage(folder)
    (fault,) = checksums.check(checkpoint.open_files(folder), threads=0)
    assert (fault.where, fault.what) == ("model-00001-of-00004.safetensors", "damaged")


def test_nan_is_found_if_looked_for_and_loads_otherwise(folder):
    file, key = named("18").damage(folder)
    text = refusal(folder, check_tensors=True)
    assert f"{key}: NaN: in {file}" in text
    assert logits(folder).isnan().any()


def test_faults_of_several_files_are_told_at_once(folder, no_weights):
    shapes = named("19").damage(folder) + named("20").damage(folder)
    lost = named("23").damage(folder)
    text = refusal(folder)
    assert "3 faults" in text
    assert all(name in text for name in (*shapes, *lost))


# --- other bad input ---------------------------------------------------------------------------------------------


def test_a_missing_folder_is_said_so(tmp_path, no_weights):
    assert f"{tmp_path / 'nope'}: no such folder" in refusal(tmp_path / "nope")


def test_a_file_is_no_folder(folder):
    assert "config.json is a file; expected a folder" in refusal(folder / "config.json")


def test_a_folder_without_config_is_refused(folder):
    (folder / "config.json").unlink()
    assert f"{folder / 'config.json'}: missing" in refusal(folder, ConfigError)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"model_type": "qwen3_moe",', "broken JSON: "),
        (b"[]", "expected a JSON object, found list"),
        (b"\xff\xfe{", "not UTF-8 text"),
        (b'{"model_type": "qwen3_moe", "model_type": "mixtral"}', "the key 'model_type' stands twice"),
        (b'{"rms_norm_eps": NaN}', "NaN is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"", "broken JSON: "),
    ],
)
def test_a_broken_config_is_refused(folder, content, said, no_weights):
    (folder / "config.json").write_bytes(content)
    text = refusal(folder, ConfigError)
    assert str(folder / "config.json") in text
    assert said in text


def test_a_config_that_is_a_folder_is_refused(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    assert "config.json: unreadable: Is a directory" in refusal(folder, ConfigError)


@pytest.mark.parametrize("model_type", ["qwen3_mor", 3, None, ["mixtral"]])
def test_an_unknown_family_is_refused_with_those_known(folder, model_type, no_weights):
    editing.edit_config(folder, model_type=model_type)
    text = refusal(folder, ConfigError)
    assert "model_type" in text
    assert all(name in text for name in ("mixtral", "qwen3_moe", "qwen2_moe", "olmoe"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"hidden_act": "gelu"}, "hidden_act: unsupported: 'gelu'; supported: 'silu'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: value: 3 does not divide"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
            "rope_type: value: expected one of default, yarn, found 'llama3'",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.quant_method: unsupported: 'awq'"),
        ({"mystery_gate": True}, "mystery_gate: unknown field: true"),
        ({"architectures": ["Other"]}, "architectures: unsupported: ['Other']"),
    ],
)
def test_an_unsupported_field_is_refused_by_name(folder, fields, said, no_weights):
    editing.edit_config(folder, **fields)
    assert said in refusal(folder, ConfigError)


def test_an_unexpected_tensor_is_refused(folder, no_weights):
    path, key = editing.first_shard(folder), "model.layers.0.mlp.mystery.weight"
    editing.store(path, {key: editing.Stored("F32", [1], bytes(4))})
    assert f"{key}: unexpected: in {path.name}" in refusal(folder)


def test_a_norm_of_integers_is_refused(folder, no_weights):
    path = editing.shard_of(folder, NORM)
    editing.store(path, {NORM: editing.Stored("I32", [64], bytes(256))})
    assert f"{NORM}: dtype: found int32 in {path.name}, expected float32" in refusal(folder)


def test_a_dtype_that_nobody_knows_is_refused(folder, no_weights):
    path = editing.shard_of(folder, NORM)
    editing.store(path, {NORM: editing.Stored("F99", [64], bytes(256))})
    text = refusal(folder)
    assert all(words in text for words in (NORM, path.name, "unknown dtype 'F99'", "BF16"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"plain text, longer than eight bytes", "not safetensors"),
        (b"GGUF\x03\0\0\0" + bytes(64), "a GGUF file"),
        (b"PK\x03\x04" + bytes(64), "a pickled PyTorch file"),
        (b"\x80\x02}q\x00." + bytes(64), "a pickled PyTorch file"),
        (b"\x10\0\0\0\0\0\0\0[1, 2, 3, 4, 56]", "the header should begin with '{'"),
    ],
)
def test_another_file_in_a_shards_place_is_called_what_it_is(folder, content, said, no_weights):
    path = editing.first_shard(folder)
    path.write_bytes(content)
    text = refusal(folder)
    assert path.name in text
    assert said in text


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_a_shard_that_is_no_regular_file_is_refused_and_does_not_hang(folder, make, no_weights):
    path = editing.first_shard(folder)
    path.unlink()
    make(path)
    assert f"{path.name}: unreadable: not a regular file" in refusal(folder)


@pytest.mark.parametrize(
    ("target", "said"), [("gone", "No such file"), ("model-00001-of-00004.safetensors", "symbolic links")]
)
def test_a_link_to_nothing_or_to_itself_is_refused(folder, target, said, no_weights):
    path = editing.first_shard(folder)
    path.unlink()
    path.symlink_to(target)
    text = refusal(folder)
    assert path.name in text
    assert said in text


def test_a_folder_without_weights_is_refused(folder, no_weights):
    for path in folder.glob("model*"):
        path.unlink()
    assert f"model.safetensors: missing: neither it nor {INDEX}" in refusal(folder)


def test_two_sets_of_weights_are_refused(folder, no_weights):
    shutil.copy(editing.first_shard(folder), folder / "model.safetensors")
    assert f"two sets of weights: {INDEX} is there too" in refusal(folder)


@pytest.mark.parametrize("name", [3, None, "a\n.safetensors", "pytorch_model.bin", "..\\x.safetensors", ""])
def test_an_index_that_names_no_shard_is_refused(folder, name, no_weights):
    editing.write_weight_map(folder, editing.weight_map(folder) | {DOWN: name})
    assert INDEX in refusal(folder)


def test_many_surplus_experts_are_one_line_a_list(folder, no_weights):
    editing.set_num_experts(folder, 1)
    editing.edit_config(folder, num_experts_per_tok=1)
    text = refusal(folder)
    assert f"{faults.EXPERTS}.*.down_proj.weight: extra index: ids found: 0-3; the model holds 0-0" in text
    assert len(text.splitlines()) == 1 + 2 * 4 + 1


def test_more_faults_than_one_can_read_are_counted(folder, no_weights):
    for key in list(editing.weight_map(folder))[:30]:
        editing.rename(folder, key, f"{key}.mystery")
    text = refusal(folder)
    assert re.search(r"^\d+ faults in ", text)
    assert re.search(r"^  ... and \d+ more$", text, re.MULTILINE)
