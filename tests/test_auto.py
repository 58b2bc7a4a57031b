"""The front door: transformers' checkpoints open with its logits, and its arguments are honoured or refused."""

import json
import shutil

import pytest
import torch
import transformers

from moebius import (
    ArgumentError,
    AutoModelForCausalLM,
    BackendError,
    Concatenate,
    ConfigError,
    GenerationConfig,
    MergeModulelist,
    WeightConverter,
    open_checkpoint,
)
from moebius.config import DecoderConfig
from tests.families import MOE_FAMILIES, TINY, make_oracle, tiny_config
from tests.model_folders import REMOVED, ids_for, logits, rewrite, tensors_of

BACKENDS = ("eager", "batched_mm", "grouped_mm", "auto")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", TINY)
def test_a_checkpoint_of_transformers_gives_its_logits(checkpoints, family, backend):
    oracle, folder = checkpoints(family)
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation=backend)
    ids = ids_for(model)
    torch.testing.assert_close(logits(model, ids), logits(oracle, ids), atol=5e-5, rtol=0)


@pytest.mark.parametrize("family", TINY)
def test_greedy_tokens_from_a_checkpoint_equal_transformers(checkpoints, family):
    oracle, folder = checkpoints(family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids, mask = ids_for(model), torch.ones(2, 24, dtype=torch.long)
    ids[0, :7], mask[0, :7] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 64, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), oracle.generate(ids, **options))


def test_the_fused_runtime_layout_opens_too(checkpoints, tmp_path):
    oracle, folder = checkpoints("qwen3_moe")
    from safetensors.torch import save_file

    state = {key: tensor.contiguous() for key, tensor in oracle.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = ids_for(model)
    torch.testing.assert_close(logits(model, ids), logits(oracle, ids), atol=5e-5, rtol=0)


def test_a_users_converters_open_a_layout_of_their_own(checkpoints, tmp_path):
    """Mixtral's published keys under Qwen3-MoE's config: w1, w3, w2 are gate, up, down."""
    oracle, folder = checkpoints("qwen3_moe")
    from safetensors.torch import load_file, save_file

    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    state = {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}
    for published, theirs in names.items():
        state = {
            key.replace("mlp.experts", "block_sparse_moe.experts").replace(published, theirs)
            if ".experts." in key
            else key: value
            for key, value in state.items()
        }
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    conversions = [
        WeightConverter(
            ["block_sparse_moe.experts.*.w1.weight", "block_sparse_moe.experts.*.w3.weight"],
            "mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            "block_sparse_moe.experts.*.w2.weight", "mlp.experts.down_proj", operations=[MergeModulelist(dim=0)]
        ),
    ]
    model = AutoModelForCausalLM.from_pretrained(tmp_path, weight_conversions=conversions)
    ids = ids_for(model)
    torch.testing.assert_close(logits(model, ids), logits(oracle, ids), atol=5e-5, rtol=0)
    model.save_pretrained(tmp_path / "copy")
    assert tensors_of(tmp_path / "copy") == tensors_of(tmp_path)


def test_auto_is_the_configs_dtype_or_else_the_files(checkpoints, tmp_path):
    _, folder = checkpoints("mixtral")
    AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16").save_pretrained(tmp_path / "half")
    path = tmp_path / "half" / "config.json"
    config = json.loads(path.read_text())
    del config["dtype"]
    path.write_text(json.dumps(config))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    path.write_text(json.dumps(config | {"torch_dtype": "float16"}))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.float16


def test_a_model_is_made_from_a_config(tmp_path):
    raw = tiny_config("qwen3_moe")
    model = AutoModelForCausalLM.from_config(raw, generator=torch.Generator().manual_seed(1))
    again = AutoModelForCausalLM.from_config(raw, generator=torch.Generator().manual_seed(1))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    weight = model.model.layers[0].mlp.experts.gate_up_proj
    assert abs(float(weight.detach().std()) - model.config.initializer_range) < 2e-3
    assert bool((model.model.norm.weight == 1).all())
    model.save_pretrained(tmp_path / "new")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "new")
    assert (config.model_type, config.num_experts_per_tok) == ("qwen3_moe", raw["num_experts_per_tok"])


def test_meta_makes_the_model_without_reading_weights(checkpoints):
    _, folder = checkpoints("olmoe")
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.num_parameters() == make_oracle("olmoe").num_parameters()


def test_loading_info_has_transformers_shape(checkpoints):
    _, folder = checkpoints("qwen2")
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert set(info) == {"missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"}
    assert not model.training


def test_the_report_accounts_for_every_tensor_and_the_time_of_each_stage(checkpoints):
    _, folder = checkpoints("mixtral")
    report = AutoModelForCausalLM.from_pretrained(folder).load_report
    assert list(report.seconds) == ["files", "plan", "weights"]
    assert all(seconds > 0 for seconds in report.seconds.values())
    data = report.to_json()
    assert sum(row["tensors"] for row in data["rows"]) + len(data["skipped"]) == len(report.plan.files.tensors)
    assert "missing 0, unexpected 0" in str(report)
    assert str(report).endswith("GB/s)")
    unread = AutoModelForCausalLM.from_pretrained(folder, device_map="meta").load_report
    assert unread.timing().endswith("no weight was read")


def test_the_experts_report_names_what_runs_each_layer_and_why(checkpoints):
    model = AutoModelForCausalLM.from_pretrained(checkpoints("mixtral")[1])
    report = model.experts_report()
    assert list(report) == [f"model.layers.{at}.mlp.experts" for at in range(len(model.model.layers))]
    assert {choice.name for choice in report.values()} == {"grouped_mm"}
    assert all("cpu in float32" in choice.reason for choice in report.values())
    model.set_experts_implementation("cpu")
    assert {tuple(choice) for choice in model.experts_report().values()} == {("cpu", "it was named")}
    with pytest.raises(BackendError, match="gradients"):
        model.experts_report(training=True)


def test_opening_reads_headers_only(checkpoints, monkeypatch):
    from moebius.checkpoint import loading

    monkeypatch.setattr(loading, "load", None)
    opened = open_checkpoint(checkpoints("mixtral")[1])
    assert isinstance(opened.config, DecoderConfig)
    assert opened.plan.bytes_to_read == opened.files.nbytes


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_backends_are_switched_at_run_time(checkpoints, family):
    _, folder = checkpoints(family)
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    ids = ids_for(model)
    expected = logits(model, ids)
    for backend in BACKENDS:
        model.set_experts_implementation(backend)
        torch.testing.assert_close(logits(model, ids), expected, atol=5e-5, rtol=0)


def test_a_folder_with_an_adapter_is_refused_rather_than_opened_without_it(checkpoints, tmp_path):
    copy = shutil.copytree(checkpoints("qwen2")[1], tmp_path / "copy")
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="adapter"):
        AutoModelForCausalLM.from_pretrained(copy)


# --- arguments ---


@pytest.mark.parametrize(
    "options",
    [
        {"low_cpu_mem_usage": True, "use_safetensors": True, "weights_only": True, "trust_remote_code": False},
        {"torch_dtype": torch.float32, "attn_implementation": "sdpa"},
        {"revision": "main", "token": None, "local_files_only": True},
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"device_map": torch.device("cpu")},
        {"quantization_config": None, "load_in_8bit": False, "load_in_4bit": None, "max_memory": None},
        {"ignore_mismatched_sizes": False, "subfolder": "", "variant": None, "config": None, "tp_plan": None},
    ],
)
def test_transformers_arguments_that_hold_anyway_are_taken(checkpoints, options):
    assert AutoModelForCausalLM.from_pretrained(checkpoints("qwen2")[1], **options).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"trust_remote_code": True}, "repository code is never run"),
        ({"use_safetensors": False}, "only safetensors"),
        ({"gguf_file": "x.gguf"}, "GGUF"),
        ({"ignore_mismatched_sizes": True}, "ignore_mismatched_sizes=True: not supported"),
        ({"tp_plan": "auto"}, "tensor parallelism"),
        ({"attn_implementation": "flash_attention_2"}, "SDPA"),
        ({"experts_implementations": "eager"}, "did you mean experts_implementation?"),
        ({"dtype": "int8"}, "expected 'auto' or one of"),
        ({"dtype": "bf16"}, "expected 'auto' or one of"),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, "contradict"),
        ({"revision": "v2"}, "a folder has no revisions"),
        ({"key_mapping": {"a": "b"}}, "weight_conversions"),
        ({"device_map": "gpu"}, "expected 'cpu', 'cuda'"),
        ({"device_map": {"model.embed_tokens": 0}}, "device_map=0: not there"),
        ({"device_map": "cuda:7"}, "torch sees 0 CUDA devices"),
    ],
)
def test_arguments_that_cannot_be_honoured_are_refused_by_name(checkpoints, options, says):
    with pytest.raises(ArgumentError) as caught:
        AutoModelForCausalLM.from_pretrained(checkpoints("qwen2")[1], **options)
    assert says in str(caught.value)


def test_a_conversion_that_finds_no_key_is_refused(checkpoints):
    typo = WeightConverter("mlp.experts.*.dwon_proj.weight", "mlp.experts.down_proj", [MergeModulelist(dim=0)])
    with pytest.raises(ArgumentError, match=r"dwon_proj.*no key"):
        AutoModelForCausalLM.from_pretrained(checkpoints("qwen3_moe")[1], weight_conversions=[typo])


def test_an_unknown_backend_is_refused_before_a_weight_is_read(checkpoints, monkeypatch):
    monkeypatch.setattr("moebius.checkpoint.loading._Loader", None)
    with pytest.raises((BackendError, ArgumentError), match="grouped_mm"):
        AutoModelForCausalLM.from_pretrained(checkpoints("mixtral")[1], experts_implementation="groupped_mm")


def test_several_wrong_arguments_are_told_at_once(checkpoints):
    with pytest.raises(ArgumentError) as caught:
        AutoModelForCausalLM.from_pretrained(checkpoints("qwen2")[1], gguf_file="x", max_memory={})
    assert len(caught.value.faults) == 2


def test_a_config_that_says_something_else_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="sliding_window"):
        AutoModelForCausalLM.from_config(tiny_config("mixtral", sliding_window=4096))


def test_a_generation_config_of_ones_own_keeps_the_checkpoints_special_ids(checkpoints):
    _, folder = checkpoints("qwen3_moe")
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = ids_for(model, batch=1)
    first = int(model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1])
    model.generation_config = GenerationConfig(eos_token_id=first, pad_token_id=0)
    given = GenerationConfig(max_new_tokens=8, do_sample=False)
    assert model.generate(ids, generation_config=given).shape == (1, 25)


@pytest.mark.parametrize("named", [{}, {"eos_token_id": [7, 9], "temperature": 0.5, "do_sample": True}])
def test_without_generation_config_the_settings_are_those_that_transformers_takes(checkpoints, named, tmp_path):
    copy = shutil.copytree(checkpoints("mixtral")[1], tmp_path / "copy")
    (copy / "generation_config.json").unlink()
    rewrite(
        copy / "config.json", **{"bos_token_id": REMOVED, "eos_token_id": REMOVED, "pad_token_id": REMOVED, **named}
    )
    ours = AutoModelForCausalLM.from_pretrained(copy, device_map="meta").generation_config.to_hf()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(copy).generation_config
    assert ours == {name: value for name, value in vars(theirs).items() if name in ours}
    assert ours == named
    assert theirs.eos_token_id == named.get("eos_token_id")


# --- generating ---


def test_two_prompts_at_once_are_refused(checkpoints):
    model = AutoModelForCausalLM.from_pretrained(checkpoints("qwen2")[1])
    ids = ids_for(model, batch=1)
    with pytest.raises(ArgumentError, match="inputs"):
        model.generate(ids, inputs=ids + 1, max_new_tokens=1)


def test_a_generation_config_of_transformers_is_refused_in_words(checkpoints):
    model = AutoModelForCausalLM.from_pretrained(checkpoints("qwen2")[1])
    with pytest.raises(ArgumentError, match=r"(?s)generation_config.*from_hf"):
        model.generate(ids_for(model), generation_config=transformers.GenerationConfig(max_new_tokens=1))
