"""A short slice of the fuzzer, what it found so far, each by its name, and faults planted to show that it sees them.

The long runs: make fuzz.
"""

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moebius import checkpoint, open_checkpoint
from moebius.errors import ArgumentError, CheckpointError, ConfigError, Fault, MoebiusError
from tests.fuzz.bases import base_named, bases
from tests.fuzz.cases import Case, Step, case_of, damaged
from tests.fuzz.documents import (
    CONFIG,
    INDEX,
    SINGLE,
    Content,
    Files,
    Link,
    Literal,
    Pairs,
    Special,
    Stored,
    join,
    pack,
    parse,
    rendered,
    shard_names,
    split,
    unpack,
)
from tests.fuzz.findings import Findings, kind_of, replayed
from tests.fuzz.guards import forbidden, memory_limit, time_limit
from tests.fuzz.mutations import MUTATIONS
from tests.fuzz.oracle import Loaded, Verdict, finding
from tests.fuzz.places import Place, write_all
from tests.fuzz.running import Runner, open_and_load, warm_up

ROOT = Path(__file__).parent.parent.parent
PER_EXPERT, SHARDED = "qwen3-per-expert", "mixtral-sharded"


@pytest.fixture(scope="module")
def place():
    with Place() as found:
        warm_up(found)
        yield found


def case(base: str = PER_EXPERT, *steps: Step, wanted: str | None = None) -> Case:
    return Case(base, steps, wanted, "sync", "never")


# --- a short slice ---------------------------------------------------------------------------------------------------


def test_two_thousand_damaged_checkpoints_are_refused_by_name_or_loaded_right(tmp_path):
    command = [sys.executable, "-m", "tests.fuzz", "--count", "2000", "--seed", "0", "--findings", str(tmp_path)]
    run = subprocess.run([*command, "--jobs", "2"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2,000 cases" in run.stdout
    assert "refused" in run.stdout
    assert "loaded" in run.stdout


@pytest.mark.parametrize("base", bases(), ids=lambda base: base.name)
@pytest.mark.parametrize("wanted", [None, "float32"])
def test_an_undamaged_base_loads_to_what_the_reference_reads(place, base, wanted):
    assert Runner(place).run(case(base.name, wanted=wanted)) == Verdict("loaded")


def test_a_case_is_its_seed_and_its_number():
    assert case_of(3, 14) == case_of(3, 14)
    assert len({case_of(3, number) for number in range(100)}) == 100
    assert damaged(case_of(3, 14)) == damaged(case_of(3, 14))


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mutation_changes_files_of_some_base(mutation):
    steps = [Step(mutation, seed) for seed in range(3)]
    assert any(damaged(case(base.name, step)).files != base.files for base in bases() for step in steps)


# --- planted faults: the judge sees them -----------------------------------------------------------------------------


def verdict_of(place: Place, subject: Callable[[Path, Case], Loaded], *steps: Step) -> Verdict:
    return Runner(place, subject=subject, seconds=0.5).run(case(PER_EXPERT, *steps))


def changed(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path, Case], Loaded]:
    """A loader that is right but for one change."""

    def load(folder: Path, case: Case) -> Loaded:
        loaded = open_and_load(folder, case)
        tensors = dict(loaded.tensors)
        change(tensors)
        return Loaded(loaded.config, tensors)

    return load


def swap_experts(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    tensors[name] = tensors[name][[1, 0, 2]]


def one_bit(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"].view(torch.int16)[3] ^= 1


def other_dtype(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].float()


def left_out(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["lm_head.weight"]


@pytest.mark.parametrize("change", [swap_experts, one_bit, other_dtype, left_out], ids=lambda change: change.__name__)
def test_a_wrong_load_is_found(place, change):
    assert "wrong load" in verdict_of(place, changed(change)).detail


def raising(error: BaseException) -> Callable[[Path, Case], Loaded]:
    def load(folder: Path, case: Case) -> Loaded:
        raise error

    return load


REMOVED = Step("tensor_removed", 1)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (KeyError("lm_head.weight"), "KeyError"),
        (RecursionError("deep"), "RecursionError"),
        (MemoryError(), "MemoryError"),
        (ArgumentError("model.safetensors"), "not the kind"),
        (MoebiusError("model.safetensors"), "not the kind"),
        (CheckpointError("something is wrong"), "no file is named"),
        (CheckpointError("x", faults=[Fault("nowhere", "shape")]), "is no file, tensor or field here"),
        (CheckpointError("x", faults=[Fault(SINGLE, "two\nlines")]), "control characters"),
        (CheckpointError("x", faults=[Fault(SINGLE, "header", "9" * 1001)]), "a line of 1001 characters"),
        (ConfigError("config.json", faults=[Fault("vocab_size", "value")]), "is named; the error"),
    ],
)
def test_an_error_that_is_no_good_is_found(place, error, says):
    assert says in verdict_of(place, raising(error), REMOVED).detail


def test_a_good_error_is_none(place):
    verdict = verdict_of(place, raising(CheckpointError("1 fault", faults=[Fault(SINGLE, "unreadable")])), REMOVED)
    assert verdict.outcome == "refused"


def test_refusing_what_is_harmless_is_found(place):
    error = CheckpointError("1 fault", faults=[Fault(SINGLE, "unreadable")])
    assert "nothing is wrong" in verdict_of(place, raising(error), Step("reordered_header", 1)).detail


def hang(folder: Path, case: Case) -> Loaded:
    threading.Event().wait()
    raise AssertionError


def write_beside(folder: Path, case: Case) -> Loaded:
    (folder / "left.tmp").touch()
    return open_and_load(folder, case)


def leave_a_thread(folder: Path, case: Case) -> Loaded:
    threading.Thread(target=threading.Event().wait, args=(2,), daemon=True).start()
    return open_and_load(folder, case)


def keep_a_file_open(folder: Path, case: Case) -> Loaded:
    KEPT_OPEN.append((folder / CONFIG).open())
    return open_and_load(folder, case)


KEPT_OPEN: list[Any] = []


def test_what_hangs_or_leaves_something_behind_is_found(place):
    assert "TooLongError" in verdict_of(place, hang).detail
    assert "threads" in verdict_of(place, leave_a_thread).detail
    assert "open files" in verdict_of(place, keep_a_file_open).detail
    KEPT_OPEN.pop().close()
    assert "left.tmp" in verdict_of(place, write_beside).detail
    (place.folder / "left.tmp").unlink()


@pytest.mark.parametrize(
    ("event", "arguments", "expected"),
    [
        ("import", ("requests", None), True),
        ("import", ("moebius.checkpoint.loading", None), False),
        ("socket.connect", (None, ("127.0.0.1", 80)), True),
        ("subprocess.Popen", ("ls", []), True),
        ("pickle.find_class", ("os", "system"), True),
        ("os.remove", ("x", -1), True),
        ("open", ("x", "wb", 0), True),
        ("open", ("x", None, 0o1101), True),
        ("open", ("x", "rb", 0o2000000), False),
        ("ctypes.dlopen", ("evil.so",), True),
        ("ctypes.dlopen", (None,), False),
    ],
)
def test_what_the_audit_hook_forbids(event, arguments, expected):
    assert forbidden(event, arguments) == expected


def test_a_finding_is_kept_with_its_files_and_replays(tmp_path):
    findings, found = Findings(tmp_path), finding("KeyError: 'x' at 17")
    assert findings.wants(found)
    kept = findings.keep("1-2", case_of(1, 2), found)
    assert replayed(kept) == case_of(1, 2)
    assert (kept / "checkpoint" / CONFIG).exists() == isinstance(damaged(case_of(1, 2)).files.get(CONFIG), bytes)
    assert kind_of(found) == kind_of(finding("KeyError: 'y' at 18"))


# --- what was found --------------------------------------------------------------------------------------------------


def refusal(folder: Path, files: Files) -> MoebiusError:
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        open_checkpoint(write_all(folder, files))
    assert all(line.isprintable() and len(line) <= 1000 for line in str(caught.value).split("\n"))
    return caught.value


def with_config(base: str = PER_EXPERT, **fields: Any) -> Files:
    files = dict(base_named(base).files)
    config = parse(files[CONFIG])
    for name, value in fields.items():
        config.put(name, value)
    return files | {CONFIG: rendered(config)}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("instead", [Special("pipe"), Link("/dev/zero"), Link("/dev/null"), Special("folder")])
@pytest.mark.parametrize(("base", "name"), [(PER_EXPERT, CONFIG), (SHARDED, CONFIG), (SHARDED, INDEX)])
def test_what_is_no_regular_file_is_not_read(tmp_path, base, name, instead: Content):
    """A pipe was waited for, a device was read until memory ended."""
    assert name in str(refusal(tmp_path, base_named(base).files | {name: instead}))


@pytest.mark.parametrize("number", [10**400, -(10**400)])
@pytest.mark.parametrize("field", ["rms_norm_eps", "rope_theta", "initializer_range", "router_aux_loss_coef"])
def test_a_number_that_no_float_can_be_is_a_wrong_value(tmp_path, field, number):
    assert field in str(refusal(tmp_path, with_config(PER_EXPERT, **{field: number})))


@pytest.mark.parametrize("sizes", [{"num_experts": 400_000}, {"num_hidden_layers": 9_999}], ids=str)
def test_sizes_far_beyond_what_the_files_hold_are_refused_at_once(tmp_path, sizes):
    files = with_config(PER_EXPERT, **sizes)
    with time_limit(2.0):
        assert "config.json" in str(refusal(tmp_path, files))


def test_a_block_wider_than_any_matrix_takes_no_memory(place):
    config = parse(base_named("qwen3-fp8-e8m0").files[CONFIG])
    config.get("quantization_config").put("weight_block_size", [128, 2**31 - 1])
    place.hold(base_named("qwen3-fp8-e8m0").files | {CONFIG: rendered(config)})
    with memory_limit():
        open_and_load(place.folder, case("qwen3-fp8-e8m0", wanted="float32"))


def test_a_key_without_the_wrappers_head_is_named_as_the_file_has_it(tmp_path):
    files = base_named("kimi-int4-wrapped").files
    stray = unpack(files[SINGLE]) | {"model.stray.weight": Stored("F32", [1], bytes(4))}
    error = refusal(tmp_path, files | {SINGLE: pack(stray)})
    assert [fault.where for fault in error.faults] == ["model.stray.weight"]


def test_tied_weights_whose_stored_copies_differ_are_refused_whatever_they_are_cast_to(tmp_path):
    files = dict(base_named("qwen3-tied").files)
    (name,) = (name for name in shard_names(files) if "lm_head.weight" in unpack(files[name]))
    shard = unpack(files[name])
    data = bytearray(shard["lm_head.weight"].data)
    data[0] ^= 1  # the last bit of a float32's fraction
    shard["lm_head.weight"].data = bytes(data)
    opened = open_checkpoint(write_all(tmp_path, files | {name: pack(shard)}), dtype="bfloat16")
    with pytest.raises(CheckpointError, match="tied weights differ"):
        checkpoint.load(opened.plan)


def test_a_number_of_which_no_square_is_finite_is_refused(tmp_path):
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale_all_dim": 1.7e308}
    assert "mscale_all_dim" in str(refusal(tmp_path, with_config("deepseek-fp8", rope_scaling=yarn)))


def test_a_long_model_type_is_cut(tmp_path):
    assert "model_type" in str(refusal(tmp_path, with_config(model_type="A" * 100_000)))


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "\x00", "A" * 100_000, "\u2028"])
def test_a_strange_name_of_a_config_field_is_shown_in_one_short_line(tmp_path, name):
    assert "unknown field" in str(refusal(tmp_path, with_config(PER_EXPERT, **{name: 1})))


@pytest.mark.parametrize("field", ["architectures", "layer_types", "hidden_act", "num_experts"])
@pytest.mark.parametrize("value", [[0] * 1000, "A" * 100_000])
def test_a_long_value_of_a_config_field_is_cut(tmp_path, field, value):
    assert field in str(refusal(tmp_path, with_config(PER_EXPERT, **{field: value})))


@pytest.mark.parametrize("name", ["a" * 5000, "a\nb", ""])
def test_a_strange_name_in_the_index_is_shown_in_one_short_line(tmp_path, name):
    files = dict(base_named(SHARDED).files)
    index = parse(files[INDEX])
    index.get("weight_map").put(name, sorted(files)[1])
    assert INDEX in str(refusal(tmp_path, files | {INDEX: rendered(index)}))


def with_header(change: Callable[[Pairs], Any]) -> Files:
    files = base_named(PER_EXPERT).files
    header, data = split(files[SINGLE])
    change(header)
    return files | {SINGLE: join(header, data)}


@pytest.mark.parametrize("header", [b"{}", b'{"__metadata__":{}} '])
def test_a_single_file_without_tensors_is_named(tmp_path, header):
    """What was said before was what is missing, which is everything."""
    error = refusal(tmp_path, base_named(PER_EXPERT).files | {SINGLE: len(header).to_bytes(8, "little") + header})
    assert [fault.where for fault in error.faults] == [SINGLE]


@pytest.mark.parametrize("field", ["dtype", "shape", "data_offsets"])
@pytest.mark.parametrize("value", [[1] * 5000, "A" * 100_000])
def test_long_values_in_a_header_are_cut(tmp_path, field, value):
    files = with_header(lambda header: header.get("lm_head.weight").put(field, value))
    assert "lm_head.weight" in str(refusal(tmp_path, files))


def test_a_name_longer_than_any_tensors_is_refused(tmp_path):
    message = str(
        refusal(tmp_path, with_header(lambda header: header.append(["x" * 501, header.get("lm_head.weight")])))
    )
    assert "501 characters; the limit is 500" in message


@pytest.mark.parametrize("place_of", ["header", "config"])
def test_half_a_surrogate_pair_is_no_text(tmp_path, place_of):
    """The safetensors library refuses it too; it could neither be printed nor saved again."""
    half = Pairs([["a", Literal('"\\ud83d"')]])
    files = with_config(id2label=half) if place_of == "config" else with_header(lambda h: h.put("__metadata__", half))
    assert "surrogate" in str(refusal(tmp_path, files))


def test_a_whole_surrogate_pair_is_text(tmp_path):
    label = Literal('{"a": "\\ud83d\\ude00"}')
    assert open_checkpoint(write_all(tmp_path, with_config(id2label=label))).raw_config["id2label"] == {
        "a": "\U0001f600"
    }
