"""The names that transformers' `generate` and generation_config.json know and GenerationConfig has no field for.

A name is inert (it changes no token here), or may only have values that ask for nothing; all else is refused by name.
"""

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from moebius.errors import Fault

# Bookkeeping, speed hints (drafts by multi-token prediction among them), and settings of methods that are off (beams,
# assistants): they decide no token here.
INERT = frozenset(
    [
        *("transformers_version", "_from_model_config", "_commit_hash", "_name_or_path"),
        *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "return_legacy_cache"),
        *("compile_config", "disable_compile", "prefill_chunk_size", "low_memory", "use_mtp"),
        *("early_stopping", "length_penalty", "renormalize_logits", "decoder_start_token_id"),
        *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "max_matching_ngram_size"),
    ]
)

# What each of these may be: the values that switch it off. None does so everywhere.
OFF_VALUES: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "typical_p": (1,),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "penalty_alpha": (0,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "guidance_scale": (1,),
    "bad_words_ids": ([],),
    "force_words_ids": ([],),
    "constraints": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({},),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "remove_invalid_values": (False,),
    "token_healing": (False,),
    "watermarking_config": (),
    "dola_layers": (),
    "prompt_lookup_num_tokens": (),
    "assistant_early_exit": (),
    "speculation_type": (),
    "continuous_batching_config": (),
    "return_dict_in_generate": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "output_scores": (False,),
    "output_logits": (False,),
    "output_router_logits": (False,),
    "assistant_model": (),
    "assistant_tokenizer": (),
    "prefix_allowed_tokens_fn": (),
    "negative_prompt_ids": (),
    "negative_prompt_attention_mask": (),
    "synced_gpus": (False,),
    "custom_generate": (),
    "trust_remote_code": (False,),
    "max_time": (),
    "inputs_embeds": (),
    "past_key_values": (),
    "position_ids": (),
    "token_type_ids": (),
}


def refusals(options: Mapping[str, Any], fields: Collection[str]) -> list[Fault]:
    """What is wrong with the names of `options` that are no fields: unsupported values, unknown names."""
    return [
        fault
        for name, value in options.items()
        if name not in fields and name not in INERT and (fault := _refusal(name, value, fields)) is not None
    ]


def _refusal(name: str, value: Any, fields: Collection[str]) -> Fault | None:
    if name not in OFF_VALUES:
        near = difflib.get_close_matches(name, [*fields, *OFF_VALUES, *INERT], n=1)
        return Fault(name, "unknown option", f"did you mean {near[0]}?" if near else "")
    off = OFF_VALUES[name]
    if value is None or any(value is not None and type(value) is not str and value == allowed for allowed in off):
        return None
    supported = " or ".join(repr(allowed) for allowed in (*off, None))
    return Fault(name, "not supported", f"found {_shown(value)}; supported: {supported}")


def _shown(value: Any) -> str:
    plain = isinstance(value, str | int | float | bool | list | tuple | dict)
    return repr(value)[:60] if plain else f"a {type(value).__name__}"
