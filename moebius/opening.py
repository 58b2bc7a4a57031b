"""What is known of a checkpoint once it is open, what is refused before a model is made, and how loading went."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from moebius import checkpoint, model_folder
from moebius.checkpoint import describe
from moebius.checkpoint.comparing import FLOATS
from moebius.checkpoint.converter import Rule
from moebius.checkpoint.files import CheckpointFiles, fault_error
from moebius.checkpoint.planning import Plan
from moebius.config import DecoderConfig
from moebius.errors import CheckpointError, Fault
from moebius.layers.quantized import can_hold
from moebius.models import Family, family_of
from moebius.models.counting import count_parameters
from moebius.quantization.forms import Form


@dataclass(frozen=True)
class FoundCheckpoint:
    """A checkpoint whose config and headers are read.

    raw_config: config.json as it stands.  config: the same, with the dtype that the model is to have.
    """

    folder: Path
    raw_config: Mapping[str, Any]
    family: Family
    config: DecoderConfig
    files: CheckpointFiles


@dataclass(frozen=True)
class OpenedCheckpoint(FoundCheckpoint):
    """A checkpoint whose plan is made too; no weight was read.

    dtype: of the model that the plan fills.  held: the weights that the model holds in a quantized form, that in which
    they are stored or the one they are brought to.
    """

    dtype: str
    plan: Plan
    held: Mapping[str, Form]
    weight_conversions: tuple[Rule, ...] = ()


@dataclass
class Stages:
    """seconds: of each stage that is over, in their order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - begin


@dataclass(frozen=True)
class LoadReport:
    """Every stored tensor and what became of it (the plan, as it was carried out), and how long each stage took.

    seconds: "files" (config and headers), "plan" (the model without weights, and the plan), "weights" (reading,
    casts, decoding, quantizing, checks; until everything is on its device).
    """

    plan: Plan
    seconds: Mapping[str, float]

    def timing(self) -> str:
        """One line: files 0.03 s, plan 0.05 s, weights 0.39 s (16.20 GB, 41.5 GB/s)."""
        stages = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.seconds.items())
        if not (weights := self.seconds.get("weights")):
            return f"{stages}; no weight was read"
        read = self.plan.bytes_to_read
        return f"{stages} ({describe.size(read)}, {read / weights / 1e9:.1f} GB/s)"

    def __str__(self) -> str:
        return f"{self.plan}\n{self.timing()}"

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data, with "seconds" by stage."""
        return {**self.plan.to_json(), "seconds": dict(self.seconds)}

    def as_transformers(self) -> dict[str, Any]:
        """transformers' shape of it; what could fill the other sets was refused before."""
        skipped = {info.name for info, _ in self.plan.skipped}
        return {"missing_keys": set(), "unexpected_keys": skipped, "mismatched_keys": set(), "error_msgs": []}


def found(folder: Path, dtype: str | None) -> FoundCheckpoint:
    """dtype: of the model, None: the config's, else the files'.  ConfigError, CheckpointError."""
    raw = model_folder.read_config(folder)
    family = family_of(raw)
    config = family.from_hf(raw)
    files = checkpoint.open_files(folder)
    refuse_more_than_stored(config, files)
    return FoundCheckpoint(
        folder, raw, family, replace(config, dtype=dtype or config.dtype or stored_dtype(files)), files
    )


def stored_forms(plan: Plan, model: nn.Module) -> Mapping[str, Form]:
    """The weights that are stored quantized and stay so.  CheckpointError: some that a model can only hold plain."""
    faults = [
        Fault(name, "stored quantized", f"as {form.name}; the model can only hold it plain")
        for name, form in plan.encoded.items()
        if not can_hold(model, name)
    ]
    if faults:
        message = f"{plan.files.folder}: not all quantized weights can stay so; no weight was read"
        raise CheckpointError(message, faults=faults, advice='load it with dtype="bfloat16", which decodes all of them')
    return plan.encoded


def refuse_more_than_stored(config: DecoderConfig, files: CheckpointFiles) -> None:
    """Before a model of such a size is made: a plan names what is missing, but cannot be made of absurd sizes."""
    asked, room = count_parameters(config).total, 64 * files.nbytes  # well beyond what a plan can list by name
    if asked > room:
        detail = f"it asks for {asked:,} parameters; {files.nbytes:,} bytes of weights are there"
        raise fault_error(files.folder, [Fault(model_folder.CONFIG_FILE, "more than the files hold", detail)])


def stored_dtype(files: CheckpointFiles) -> str:
    """The float that most of the files' bytes are in."""
    nbytes: Counter[str] = Counter()
    for info in files.tensors.values():
        nbytes[info.dtype] += info.nbytes if info.dtype in FLOATS else 0
    return max(FLOATS, key=lambda name: nbytes[name])
