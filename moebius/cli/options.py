"""The flags that commands share, each declared once. Types and help; defaults stand in the commands' signatures."""

from typing import Annotated, Literal

import typer

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Form = Literal["int8", "int4", "fp8", "mxfp4"]

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model's folder, or its name on the hub.")]
Revision = Annotated[str, typer.Option("--revision", help="The hub's branch, tag or commit.")]
Offline = Annotated[bool, typer.Option("--offline", help="Use what is on this machine; reach for no network.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Load as this dtype; auto: the checkpoint's own.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...; auto: the GPUs, the host for the rest.")]
Experts = Annotated[str, typer.Option("--experts", help="The experts' backend: auto, eager, grouped_mm, ...")]
EpSize = Annotated[
    int | None,
    typer.Option("--ep-size", min=1, help="Ranks that share the experts, under torchrun. [default: all of them]"),
]
Quantization = Annotated[
    Form | None, typer.Option("--quantization", help="Quantize experts and linear layers to this form.")
]
GroupSize = Annotated[
    int | None, typer.Option("--group-size", min=8, help="Inputs that share a scale in int4. [default: 32]")
]
ExpertsOnly = Annotated[bool, typer.Option("--experts-only", help="Quantize the routed experts alone.")]
ModulesToNotConvert = Annotated[
    list[str] | None,
    typer.Option("--modules-to-not-convert", help="Leave these plain, as in self_attn; may be given more than once."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but the result and errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say which choices were made.")]

SystemPrompt = Annotated[str | None, typer.Option("--system-prompt", help="The system's message.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "--max-new-tokens", "-n", min=1, help="Stop after so many.")]
Temperature = Annotated[
    float | None,
    typer.Option("--temperature", min=0.0, help="0: the likeliest token. [default: the checkpoint's]"),
]
TopP = Annotated[
    float | None, typer.Option("--top-p", min=0.0, max=1.0, help="Keep the likeliest, up to this probability.")
]
TopK = Annotated[int | None, typer.Option("--top-k", min=0, help="Keep so many of the likeliest tokens; 0: all.")]
MinP = Annotated[
    float | None, typer.Option("--min-p", min=0.0, max=1.0, help="Drop what is below this share of the likeliest.")
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Same seed, same tokens. [default: drawn, and shown]")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="End at this text; may be given more than once.")]

Context = Annotated[int, typer.Option("--ctx", min=1, help="Tokens of context to reckon the KV cache for.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Sequences at a time to reckon the KV cache for.")]
Ranks = Annotated[
    int | None,
    typer.Option("--ranks", min=1, help="Also what each of so many expert-parallel ranks would read and hold."),
]
Keys = Annotated[bool, typer.Option("--keys", help="List every tensor too.")]
