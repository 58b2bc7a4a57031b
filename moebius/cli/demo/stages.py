"""The demo's stages, in order. Each uses the library as a user would; a proof that fails ends the demo with an error.

L MoE layers, E experts, N tokens.
"""

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebius.auto import AutoModelForCausalLM, CausalLM
from moebius.cli.console import Console, print_result
from moebius.cli.demo import pictures
from moebius.cli.demo.folder import DemoFolder
from moebius.cli.demo.proofs import Proof, layout_proof, logits_proof, skill_proof, tensors_proof, tokens_proof
from moebius.cli.demo.text import VOCABULARY, DemoText, demo_text, library_sources, train_tokenizer
from moebius.cli.progress import training_report
from moebius.errors import MoebiusError
from moebius.generation.stream import TextStreamer
from moebius.tokenizer import Tokenizer
from moebius.training.config import TrainingConfig
from moebius.training.data import TokenWindows
from moebius.training.evaluation import bits_per_byte
from moebius.training.routing import RoutingCounts
from moebius.training.trainer import TrainingResult, train

BATCH_SIZE, SEQ_LEN = 8, 96
LOAD_TOKENS = 12_000  # tokens of each text that the picture of expert load is counted on
PROMPT = 'The "for" statement'
NEW_TOKENS = 120

MODEL: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "intermediate_size": 64,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": True,
    "initializer_range": 0.06,  # after 150 steps the loss is 4.4 with 0.02, 3.9 with 0.05 to 0.09
}


@dataclass
class Run:
    """What a run has gathered so far."""

    folder: DemoFolder
    steps: int
    seed: int
    console: Console
    seconds: dict[str, float] = field(default_factory=dict)
    proofs: list[Proof] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[None]:
        print_result(f"\n{len(self.seconds) + 1}. {title}")
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 2)

    def prove(self, proof: Proof) -> None:
        """Keeps a proof that holds, and ends the demo with one that does not."""
        if not proof.holds:
            raise MoebiusError(f"the demo's proof failed: {proof.claim}: {proof.found}")
        self.proofs.append(proof)
        print_result(f"   proved: {proof.claim}: {proof.found}")


def run_demo(folder: DemoFolder, steps: int, seed: int, console: Console) -> None:
    run = Run(folder, steps, seed, console)
    started = time.perf_counter()
    text, tokenizer = find_text(run)
    model, result = train_model(run, text, tokenizer)
    save_model(run, model, tokenizer)
    loaded = load_model(run, model, text, tokenizer)
    generate_text(run, loaded, tokenizer)
    draw_pictures(run, loaded, tokenizer, text, result)
    run.seconds["total"] = round(time.perf_counter() - started, 2)
    finish(run)


def find_text(run: Run) -> tuple[DemoText, Tokenizer]:
    with run.stage("text", f"Text, and a byte-level BPE of {VOCABULARY} tokens"):
        text = demo_text()
        tokenizer = train_tokenizer(text.training)
        run.figures["text"] = {"title": text.title, "sha256": text.sha256}
        sizes = f"{len(text.training.encode()):,} bytes to train on, {len(text.held_out.encode()):,} held out"
        print_result(f"   {text.title}: {sizes}\n   sha256 {text.sha256}")
    return text, tokenizer


def train_model(run: Run, text: DemoText, tokenizer: Tokenizer) -> tuple[CausalLM, TrainingResult]:
    generator = torch.Generator().manual_seed(run.seed)
    model = AutoModelForCausalLM.from_config(MODEL | {"eos_token_id": tokenizer.eos_token_id}, generator=generator)
    size = f"{model.num_parameters() / 1e6:.2f} M parameters, {run.steps} steps of {BATCH_SIZE} x {SEQ_LEN} tokens"
    with run.stage("train", f"Train a qwen3_moe: 3 layers, 8 experts, 2 a token; {size}"):
        result = _train(run, model, tokens_of(text.training, tokenizer))
        _report_training(run, result)
    with run.stage("held_out", "Read the held-out text"):
        bits = bits_per_byte(model, tokens_of(text.held_out, tokenizer), len(text.held_out.encode()), SEQ_LEN)
        run.figures["bits_per_byte"] = {"model": bits, "zlib -9": text.zlib_bits_per_byte}
        print_result(f"   {bits:.3f} bits a byte; zlib -9 needs {text.zlib_bits_per_byte:.3f}, and has the whole text")
        run.prove(skill_proof(bits, run.steps))
    return model, result


def tokens_of(text: str, tokenizer: Tokenizer) -> Tensor:
    """[N] int64: the end-of-text token, then the text, so that its first token is predicted from something too."""
    return torch.tensor([tokenizer.eos_token_id, *tokenizer.encode(text)])


def _train(run: Run, model: CausalLM, tokens: Tensor) -> TrainingResult:
    config = TrainingConfig(
        steps=run.steps,
        batch_size=BATCH_SIZE,
        seq_len=SEQ_LEN,
        learning_rate=6e-3,
        warmup_steps=min(50, run.steps // 10),
        weight_decay=0.1,
        balance_scope="layer",  # pooled, each layer leaves an expert or two almost idle
        seed=run.seed,
    )
    windows = TokenWindows(tokens, BATCH_SIZE, SEQ_LEN, run.seed)
    with training_report(run.console, run.steps) as report:
        return train(model, windows.batch, config, on_step=lambda record: report.step(record.step, record.loss))


def _report_training(run: Run, result: TrainingResult) -> None:
    losses = [record.loss for record in result.records]
    seconds = sum(record.seconds for record in result.records)
    speed = run.steps * BATCH_SIZE * SEQ_LEN / seconds
    run.figures["loss"] = {"first": losses[0], "last": pictures.running_mean(losses)[-1]}
    run.figures["training_tokens_per_second"] = round(speed)
    print_result(f"   loss {losses[0]:.2f} -> {run.figures['loss']['last']:.2f}; {speed:,.0f} tokens a second")


def save_model(run: Run, model: CausalLM, tokenizer: Tokenizer) -> None:
    with run.stage("save", f"Save in the hub's layout, a tensor an expert: {run.folder.model}"):
        model.save_pretrained(run.folder.model)
        tokenizer.save_pretrained(run.folder.model)


def load_model(run: Run, trained: CausalLM, text: DemoText, tokenizer: Tokenizer) -> CausalLM:
    with run.stage("load", "Plan, and load through the converter"):
        # copied, so that weights are aligned as they were in training: products then agree to the last bit
        loaded: CausalLM = AutoModelForCausalLM.from_pretrained(run.folder.model, mapping="never")
        assert loaded.plan is not None  # it was loaded, so it was planned
        print_result("\n".join(f"   {line}" for line in str(loaded.plan).splitlines()))
        run.prove(layout_proof(loaded.plan, loaded.config))
        run.prove(tensors_proof(trained, loaded))
        run.prove(logits_proof(trained, loaded, tokens_of(text.held_out, tokenizer)[None, :SEQ_LEN]))
    return loaded


def generate_text(run: Run, model: CausalLM, tokenizer: Tokenizer) -> None:
    with run.stage("generate", f"Generate {NEW_TOKENS} tokens after {PROMPT!r}, temperature 0.7"):
        prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": True, "temperature": 0.7, "seed": run.seed}
        streamer = TextStreamer(tokenizer, skip_special_tokens=True)
        auto = model.generate(prompt, streamer=streamer, **options)
        model.set_experts_implementation("eager")
        eager = model.generate(prompt, **options)
        model.set_experts_implementation("auto")
        run.prove(tokens_proof(auto, eager))


def draw_pictures(run: Run, model: CausalLM, tokenizer: Tokenizer, text: DemoText, result: TrainingResult) -> None:
    with run.stage("pictures", "Draw the expert load on prose and on code, and the loss"):
        texts = {"prose (held out)": text.held_out, "code": "".join(library_sources(4 * LOAD_TOKENS))}
        tables = {name: expert_load(model, tokens_of(source, tokenizer)) for name, source in texts.items()}
        pictures.draw_expert_load(run.folder.picture("expert_load"), tables)
        pictures.draw_loss(run.folder.picture("loss"), [record.loss for record in result.records])
        names = [str(run.folder.picture(name)) for name in ("expert_load", "loss")]
        print_result(f"   {' and '.join(names)}" if pictures.can_draw() else f"   {pictures.HINT}")


@torch.no_grad()
def expert_load(model: CausalLM, tokens: Tensor) -> Tensor:
    """[L, E] int64: how many of the first tokens each layer sent to each expert."""
    windows = tokens[:LOAD_TOKENS]
    with RoutingCounts(model) as counts:
        for batch in windows[: windows.numel() // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN).split(BATCH_SIZE):
            model(batch)
    return counts.table()


def finish(run: Run) -> None:
    proofs = {proof.claim: proof.found for proof in run.proofs}
    settings = {"finished": True, "steps": run.steps, "seed": run.seed, "threads": torch.get_num_threads()}
    run.folder.write_report(settings | {"seconds": run.seconds, "figures": run.figures, "proofs": proofs})
    times = "\n".join(f"   {name:<10} {seconds:>7.2f} s" for name, seconds in run.seconds.items())
    print_result(f"\n{len(proofs)} proofs hold; times:\n{times}\n   all of it: {run.folder.report}")
    command = command_name()
    print_result(
        "\nTry next:\n"
        f"   {command} generate {run.folder.model} -p 'The \"while\" statement' --temperature 0.7\n"
        f"   {command} inspect {run.folder.model}\n"
        f"   {command} plan {run.folder.model}"
    )


def command_name() -> str:
    """How this command is called again: by its name where the shell finds it, else as it was called."""
    called, found = Path(sys.argv[0]), shutil.which("moebius")
    if called.name != "moebius":
        return f"{sys.executable} -m moebius.cli"
    return "moebius" if found is not None and Path(found).resolve() == called.resolve() else str(called)
