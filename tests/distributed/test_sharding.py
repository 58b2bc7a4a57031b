"""FSDP2 around what is peculiar: routers of another dtype than their layer's, quantized weights."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moebius import AutoModelForCausalLM, checkpoint
from moebius.distributed.config import DistributedConfig
from moebius.distributed.expert_parallel import parallel_experts
from moebius.distributed.ranks import Ranks, join
from moebius.distributed.sharding import fill, shard
from moebius.distributed.spread import Spread, spread_of
from moebius.errors import ArgumentError
from moebius.layers.decoder import Decoder
from moebius.models import family_of
from moebius.training.config import TrainingConfig
from moebius.training.data import TokenWindows
from moebius.training.share import share_of
from moebius.training.states import StateFolder
from moebius.training.trainer import make_optimizer, train
from tests.distributed.pool import run_ranks
from tests.families import MOE_FAMILIES, randomize, tiny_config

FSDP = DistributedConfig(ep_size=1, fsdp_size=2, batch="distinct")
"""Every rank runs its own tokens through all experts: bit for bit what one process does."""
FLOAT32_GATE = "minimax_m2"


# --- narrow weights, wide routers -------------------------------------------------------------------------------------


def narrow_decoder(family: str, **options: Any) -> Decoder:
    """In bfloat16, but for what is float32 in it."""
    decoder = Decoder(family_of(tiny_config(family)).from_hf(tiny_config(family)), **options).bfloat16()
    for buffer in decoder.buffers():
        buffer.zero_()
    randomize(decoder, 0)
    return decoder


def sharded(whole: Decoder, ranks: Ranks) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(whole.config, experts_class=parallel_experts(ranks, FSDP)).bfloat16()
    shard(decoder, ranks)
    boxes = spread_of(decoder).boxes
    fill(decoder, {name: rows_of(tensor.detach(), boxes.get(name)) for name, tensor in whole.state_dict().items()})
    return decoder


def rows_of(tensor: Tensor, rows: range | None) -> Tensor:
    return tensor.clone() if rows is None else tensor[rows.start : rows.stop].clone()


def backward(decoder: Decoder, sequence: int) -> float:
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(sequence))
    loss = decoder(ids, labels=ids, output_router_logits=False).loss
    loss.backward()
    return float(loss)


def differing(decoder: Decoder, whole: Decoder, spread: Spread) -> list[str]:
    """Whose gradients are not those of one process, dtype and bits."""
    expected = {name: rows_of(each.grad, spread.boxes.get(name)) for name, each in whole.named_parameters()}
    found = {name: spread.local(each.grad) for name, each in decoder.named_parameters()}
    return [name for name in expected if not same(found[name], expected[name])]


def same(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(one, two)


def narrow_steps(ranks: Ranks) -> dict[str, tuple[list[float], list[str], float]]:
    """Of each family: this rank's loss, sharded and alone; whose gradients differ; the norm's relative error."""
    mine, answers = join(FSDP, 4, device_type="cpu"), {}
    for family in MOE_FAMILIES:
        whole = narrow_decoder(family)
        decoder, alone = sharded(whole, mine), [backward(whole, rank) for rank in range(ranks.size)]
        losses, share = [backward(decoder, ranks.rank), alone[ranks.rank]], share_of(decoder)
        found = share.clip(1e9)  # adds up, and scales nothing
        norm = torch.stack([each.grad.double().norm() for each in whole.parameters()]).norm()
        answers[family] = losses, differing(decoder, whole, spread_of(decoder)), float(found / norm - 1)
    return answers


def test_every_family_in_bfloat16_has_the_gradients_of_one_process():
    for found in run_ranks(2, narrow_steps):
        assert list(found) == list(MOE_FAMILIES)
        for family, (losses, others, norm_error) in found.items():
            assert (family, others) == (family, [])
            assert losses[0] == losses[1]
            assert abs(norm_error) < 0.01  # of numbers in bfloat16


def train_narrow(ranks: Ranks, folder: Path, path: Path) -> None:
    """Opened, saved as it is, trained a little, and saved with its state."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", distributed_config=FSDP)
    model.save_pretrained(path / "untrained")
    text = TokenWindows(torch.arange(500) % 97, batch_size=4, seq_len=8)
    train(model, text.batch, SETTINGS, states=StateFolder(path / "state"))
    model.save_pretrained(path / "trained")


SETTINGS = TrainingConfig(steps=2, batch_size=4, seq_len=8, learning_rate=1e-2)


def test_a_float32_router_is_opened_trained_and_saved_as_such(tmp_path):
    model = AutoModelForCausalLM.from_config(tiny_config(FLOAT32_GATE), dtype="bfloat16")
    randomize(model, seed=0)
    model.save_pretrained(tmp_path / "hub")
    run_ranks(2, train_narrow, tmp_path / "hub", tmp_path)
    files = {name: load_file(tmp_path / name / "model.safetensors") for name in ("hub", "untrained", "trained")}
    gates = [name for name in files["hub"] if name.endswith("gate.weight")]
    assert {files["hub"][name].dtype for name in gates} == {torch.float32}
    assert all(same(files["untrained"][name], tensor) for name, tensor in files["hub"].items())
    assert not any(torch.equal(files["trained"][name], files["hub"][name]) for name in gates)
    assert all(files["trained"][name].dtype == tensor.dtype for name, tensor in files["hub"].items())
    resumed, saved = resume(model, tmp_path / "state"), AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert all(same(resumed[name], tensor) for name, tensor in saved.state_dict().items())


def resume(model: Decoder, path: Path) -> dict[str, Tensor]:
    assert StateFolder(path).resume(model, make_optimizer(model.parameters(), SETTINGS), SETTINGS) == SETTINGS.steps
    return model.state_dict()


# --- quantized weights ------------------------------------------------------------------------------------------------


def refused(ranks: Ranks, folder: Path, loading: dict[str, Any]) -> tuple[str, set[str], bool]:
    """What the error says, whom it names, and whether a weight was read before."""
    with mock.patch.object(checkpoint, "load", side_effect=checkpoint.load) as load:
        with pytest.raises(ArgumentError) as caught:
            AutoModelForCausalLM.from_pretrained(folder, distributed_config=FSDP, **loading)
        return caught.value.message, {fault.where for fault in caught.value.faults}, load.called


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A model plain, and one whose files have fp8."""
    path = tmp_path_factory.mktemp("quantized")
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"), dtype="bfloat16")
    model.save_pretrained(path / "plain")
    AutoModelForCausalLM.from_pretrained(path / "plain", quantization="fp8").save_pretrained(path / "fp8")
    return path


@pytest.mark.parametrize(
    ("folder", "loading"),
    [("plain", {"quantization": "fp8"}), ("fp8", {"dtype": "auto"}), ("plain", {"quantization": "int8"})],
    ids=["made fp8", "stored fp8", "made int8"],
)
def test_quantized_weights_are_refused_before_any_is_read(folders, folder, loading):
    for message, named, read in run_ranks(2, refused, folders / folder, loading):
        assert message == "fsdp_size above 1 is for training, and quantized weights are not trained"
        assert {"model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.experts.down_proj"} < named
        assert not any("norm" in name or "gate.weight" in name for name in named)
        assert not read


def open_decoded(ranks: Ranks, folder: Path) -> str:
    return str(AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16", distributed_config=FSDP).dtype)


def test_weights_that_are_decoded_while_they_are_read_are_sharded(folders):
    assert run_ranks(2, open_decoded, folders / "fp8") == ["torch.bfloat16"] * 2
