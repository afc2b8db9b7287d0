"""config.json of Hugging Face: every field is honoured, has its default, changes nothing, or is refused by name."""

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

from lovely_llama import Config, LlamaError, RopeScaling, check, is_number, is_whole

from ..strict_json import read_json
from .layout import rope_scaling
from .model import open_file

# The field of `Config` that each describes: whole numbers, all required.
SIZES = {
    "vocab_size": "vocab", "hidden_size": "dim", "num_hidden_layers": "layers", "num_attention_heads": "q_per_kv",
    "intermediate_size": "hidden_dim", "max_position_embeddings": "ctx",
}  # fmt: skip
OTHERS = {
    "num_key_value_heads": "kv_heads", "head_dim": "head_dim", "rms_norm_eps": "eps", "rope_theta": "theta",
    "rope_scaling.original_max_position_embeddings": "rope_scaling.original_ctx", "tie_word_embeddings": "tied",
}  # fmt: skip

# Fields of which one value is that of every Llama, and any other changes the mathematics.
FIXED: dict[str, Any] = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False,
    "quantization_config": None, "partial_rotary_factor": 1.0, "rope_interleaved": False, "is_encoder_decoder": False,
    "add_cross_attention": False, "tie_encoder_decoder": False, "pruned_heads": {},
}  # fmt: skip

# Architectures whose mathematics is a Llama's, and what their fields are where a file does not state them.
MODEL_TYPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4096, "num_key_value_heads": 8, "rms_norm_eps": 1e-6},
    "Yi": {},
}

# Fields that change nothing in a Llama, whatever their value, by the reason.
REASONS = {
    "of training alone": "attention_dropout attention_dropout_prob attn_pdrop classifier_dropout embd_pdrop "
    "gradient_checkpointing hidden_dropout hidden_dropout_prob initializer_factor initializer_range "
    "neftune_noise_alpha resid_pdrop tf_legacy_loss unsloth_fixed use_bfloat16 use_gradient_checkpointing",
    "how it is computed, not what": "_attn_implementation _attn_implementation_autoset _flash_attn_2_enabled "
    "attn_implementation chunk_size_feed_forward dtype pretraining_tp torch_dtype torchscript use_cache "
    "use_flash_attention use_flash_attn use_memorry_efficient_attention use_memory_efficient_attention",
    "a token, which the tokenizer knows": "bos_token bos_token_id decoder_start_token_id end_token_id eos_token "
    "eos_token_id forced_bos_token_id forced_eos_token_id pad_token pad_token_id prefix sep_token_id tokenizer_class "
    "unk_token unk_token_id",
    "a length that another program had": "max_sequence_length max_seq_len model_max_length seq_length "
    "tokenizer_model_max_length",
    "of choosing tokens, which generation_config.json says": "bad_words_ids begin_suppress_tokens diversity_penalty "
    "do_sample early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty length_penalty max_length "
    "min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences repetition_penalty "
    "remove_invalid_values suppress_tokens temperature top_k top_p typical_p",
    "of heads for other tasks": "cross_attention_hidden_size finetuning_task id2label is_decoder label2id problem_type "
    "task_specific_params",
    "of what a program returns": "keys_to_ignore_at_inference output_attentions output_hidden_states output_scores "
    "return_dict return_dict_in_generate",
    "where a file is from": "_commit_hash _name_or_path architectures custom_pipelines is_llama_config license "
    "model_name transformers.js_config transformers_version unsloth_version",
    "code of its own, which is not run": "auto_map",
}
NEUTRAL = {name: reason for reason, names in REASONS.items() for name in names.split()}

ORIGINAL = "original_max_position_embeddings"
ROPE = ("rope_scaling", "rope_parameters", ORIGINAL)

UNKNOWN = "no field that is unknown here: it may change the mathematics (--allow {} reads on)"

LIMIT = 2**21  # bytes of a file with fields; the index of the largest model needs a tenth of that

Fields = dict[str, tuple[Any, str]]  # of `Checkpoint`


def config_from_hf(config: Mapping[str, Any] | str | Path) -> Config:
    """The `Config` that a config.json describes, given by its path or as a mapping, such as `config.to_dict()`."""
    if isinstance(config, Mapping):
        return read_config(config, "config")[0]
    return read_config(read_fields(Path(config)), config)[0]


def read_fields(path: Path, folder: Path | None = None) -> dict[str, Any]:
    """The object in a small JSON file, which may belong to a folder."""
    with open_file(path, folder) as file:
        data = file.read(LIMIT + 1)
    check("size", f"more than {LIMIT} bytes", len(data) <= LIMIT, "less", path)
    return read_json(data, path)


def read_config(given: Mapping[str, Any], file: object, allow: Collection[str] = ()) -> tuple[Config, Fields]:
    """The config, and what became of each field. One that is null counts as absent, unless it must have a value.

    Fields that are not known are refused, but for those allowed."""
    must, stated = partial(check, file=file), {name: value for name, value in given.items() if value is not None}
    fields: Fields = {name: (value, "ignored") for name, value in given.items()}
    kind = stated.get("model_type")
    must("model_type", f"{kind!r:.60}", isinstance(kind, str) and kind in MODEL_TYPES, " or ".join(MODEL_TYPES))
    fields["model_type"] = kind, "honoured"
    if usual := MODEL_TYPES[str(kind)]:
        stated = {name: value for name, value in usual.items() if name not in given} | stated

    def take(name: str, kind: type, *default: Any) -> Any:
        must(name, "nothing", name in stated or bool(default), "a value")
        value = stated.get(name, *default)
        number = kind is float and is_number(value)
        must(name, f"{value!r:.60}", number or type(value) is kind or name not in stated, NAMED[kind])
        fields[name] = value, "defaulted" if given.get(name) is None else "honoured"
        return value

    for name, value in FIXED.items():
        if name in stated:
            must(name, f"{stated[name]!r:.60}", is_same(stated[name], value), "null" if value is None else value)
            fields[name] = value, "honoured"
    kinds = stated.get("layer_types", [])
    full = isinstance(kinds, list) and all(kind == "full_attention" for kind in cast(list[Any], kinds))
    must("layer_types", f"{kinds!r:.60}", full, "full_attention in every layer")
    known = {*SIZES, *OTHERS, *FIXED, *NEUTRAL, *ROPE, "layer_types", "model_type", "sliding_window", *allow}
    for name, value in stated.items():
        must(name, f"{value!r:.60}", name in known, UNKNOWN.format(name))

    sizes = {ours: take(name, int) for name, ours in SIZES.items()}
    heads, dim = sizes.pop("q_per_kv"), sizes["dim"]
    must("num_attention_heads", heads, heads > 0, "a number above 0")
    kv_heads = take("num_key_value_heads", int, heads)
    must("num_key_value_heads", kv_heads, kv_heads > 0 and heads % kv_heads == 0, f"a divisor of {heads}, the heads")
    must("head_dim", "nothing", "head_dim" in stated or dim % heads == 0, f"a number, as {heads} does not divide {dim}")
    window, least = stated.get("sliding_window"), f"null, or at least {sizes['ctx']}, the context"
    whole = is_whole(window) and window >= sizes["ctx"]
    must("sliding_window", f"{window!r:.60}", window is None or whole or "use_sliding_window" in stated, least)
    theta, scaling = read_rope(stated, file)
    fields["rope_theta"] = theta or 1e4, "honoured" if theta else "defaulted"
    for name in {*ROPE, "sliding_window"} & stated.keys():
        fields[name] = stated[name], "honoured"
    names = {ours: name for name, ours in (SIZES | OTHERS).items()}
    try:
        config = Config(
            **sizes,
            kv_heads=kv_heads,
            q_per_kv=heads // kv_heads,
            head_dim=take("head_dim", int, dim // heads),
            eps=float(take("rms_norm_eps", float)),
            theta=float(theta or 1e4),
            rope_scaling=scaling,
            tied=take("tie_word_embeddings", bool, False),
        )
    except LlamaError as error:
        raise LlamaError(file, names.get(error.field, error.field), error.got, error.expected) from error
    return config, fields


NAMED = {int: "a whole number", float: "a finite number", bool: "true or false"}


def is_same(a: object, b: object) -> bool:
    """Equality that tells 0 from false."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def read_rope(stated: Mapping[str, Any], file: object) -> tuple[Any, RopeScaling | None]:
    """Theta, if stated, and the scaling: of rope_parameters, or of rope_theta and rope_scaling, or of both if equal."""
    thetas, scalings = dict[str, Any](), dict[str, RopeScaling | None]()
    if "rope_theta" in stated:
        thetas["rope_theta"] = stated["rope_theta"]
    for name in ("rope_scaling", "rope_parameters"):
        if name in stated:
            fields = stated[name]
            check(name, f"{fields!r:.60}", isinstance(fields, Mapping), "an object", file)
            fields = {key: value for key, value in fields.items() if value is not None}
            if is_same(fields.get("partial_rotary_factor"), 1.0):
                del fields["partial_rotary_factor"]
            fields.pop("finetuned", None)  # says how the weights came about
            if fields.get("rope_type", fields.get("type")) in ("llama3", "yarn"):
                fields = with_original(fields, stated, name, file)
            scalings[name] = rope_scaling(fields, file)
            if "rope_theta" in fields:
                thetas[f"{name}.rope_theta"] = fields["rope_theta"]
    for name, value in thetas.items():
        check(name, f"{value!r:.60}", is_number(value) and value > 1, "a finite number above 1", file)
        other, first = next(iter(thetas.items()))
        check(name, value, value == first, f"{first}, as {other} is", file)
    if len(scalings) == 2:
        same = scalings["rope_scaling"] == scalings["rope_parameters"]
        check("rope_scaling", "another scaling", same, "that of rope_parameters", file)
    return next(iter(thetas.values()), None), next(iter(scalings.values()), None)


def with_original(fields: dict[str, Any], stated: Mapping[str, Any], where: str, file: object) -> dict[str, Any]:
    """A scaling with its original context: stated beside it in some files, and for YaRN by default the context."""
    outer, inner = stated.get(ORIGINAL), fields.get(ORIGINAL)
    agree = None in (outer, inner) or is_same(outer, inner)
    check(ORIGINAL, f"{outer!r:.60}", agree, f"{inner!r:.60}, as {where} has", file)
    if outer is None and fields.get("rope_type", fields.get("type")) == "yarn":
        outer = stated["max_position_embeddings"]
    return {ORIGINAL: outer, **fields} if inner is None else fields


def config_to_hf(config: Config) -> dict[str, Any]:
    """The fields of a config.json; those of the rotary embedding stand both where transformers 4 and where 5 looks."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling := config.rope_scaling:
        rope = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind != "linear":
            rope["original_max_position_embeddings"] = scaling.original_ctx
        if scaling.kind == "llama3":
            rope |= {"low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
        if scaling.kind == "yarn":
            turns = {"beta_slow": float(scaling.low), "beta_fast": float(scaling.high)}
            rope |= turns | {"attention_factor": scaling.attention_factor}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab,
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.kv_heads * config.q_per_kv,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden_dim,
        "max_position_embeddings": config.ctx,
        "rms_norm_eps": config.eps,
        "rope_theta": config.theta,
        "rope_scaling": rope if scaling else None,
        "rope_parameters": rope | {"rope_theta": config.theta},
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
