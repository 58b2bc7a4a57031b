"""Open experts that are stored in a layout of one's own, by rules of one's own, and write them back.

The program makes a small Qwen3-MoE whose files hold each expert's down projection transposed, [I, H], then opens it.

    python examples/own_layout.py
"""

import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

from moebius import AutoModelForCausalLM, MergeModulelist, Transpose, WeightConverter

CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 128,
    "hidden_size": 64,
    "max_position_embeddings": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}

TRANSPOSED = WeightConverter(
    "mlp.experts.*.down_proj.weight", "mlp.experts.down_proj", operations=[Transpose(0, 1), MergeModulelist(dim=0)]
)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        AutoModelForCausalLM.from_config(CONFIG).save_pretrained(path)
        weights = load_file(path / "model.safetensors")
        stored = {key: w.T.contiguous() if ".experts." in key and "down" in key else w for key, w in weights.items()}
        save_file(stored, path / "model.safetensors")
        model = AutoModelForCausalLM.from_pretrained(path, weight_conversions=[TRANSPOSED])
        print(model.plan)
        model.save_pretrained(path)
        assert all(w.equal(stored[key]) for key, w in load_file(path / "model.safetensors").items())
        print("saved back in the same layout")


if __name__ == "__main__":
    main()
