"""The families of models that can be imported: config.json -> ModelConfig, and which tensor is which weight.

A family is data and two small functions; nothing of it computes. Sources of the facts: the configs and
weight names of the public repositories, and the modelling code of transformers for what it ships.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from sleeptrain.checkpoint.huggingface.fields import Fields
from sleeptrain.checkpoint.huggingface.pairs import Pair, pair
from sleeptrain.config import BlockSpec, ModelConfig
from sleeptrain.schema import ConfigError, from_dict, unknown

_O_BIAS = "the output projection of attention has no bias here"
_NORMS = {"input_layernorm": "mixer_norm", "post_attention_layernorm": "mlp_norm"}
_SANDWICH = _NORMS | {"input_layernorm_2": "mixer_out_norm", "post_attention_layernorm_2": "mlp_out_norm"}
_POST = {"post_attention_layernorm": "mixer_out_norm", "post_feedforward_layernorm": "mlp_out_norm"}
_QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")


class Family(NamedTuple):
    """``model`` reads a config.json, ``mixer`` gives the pairs of a block's mixer (None: all tensors are
    called as they are here), ``norms`` the names of a block's norms, theirs to ours.

    ``kept``: tensors that no block here computes with, stored with the checkpoint and written back.
    ``left_out``: those that are dropped. ``renamed``: regular expressions for names that a file may have
    instead. ``sleep`` reads the settings of the sleep loop that go with it.
    """

    model: Callable[[Fields], dict[str, Any]]
    mixer: Callable[[ModelConfig, BlockSpec, str, str], Iterator[Pair]] | None
    norms: Callable[[BlockSpec], dict[str, str]] = lambda spec: _NORMS
    kept: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ("*.rotary_emb.inv_freq",)
    renamed: tuple[tuple[str, str], ...] = ()
    sleep: Callable[[Fields], dict[str, Any]] = lambda fields: {}


def family_of(fields: Fields) -> tuple[Family, Fields]:
    """The family of a config.json, and the part of it that describes the language model."""
    kind = fields.get("model_type")
    section = fields.inside("text_config") if "text_config" in fields.values else fields
    section.refuse_foreign()  # first: a model_type with experts is unknown, too, and this says why
    if kind not in FAMILIES:
        raise ConfigError(unknown(f"model_type in {fields.where}/config.json:", kind, FAMILIES))
    return FAMILIES[kind], section


def model_config(family: Family, fields: Fields, is_tied: bool) -> ModelConfig:
    """``is_tied`` counts where the config.json does not say whether the head is the embedding."""
    if family.mixer is None:
        return from_dict(ModelConfig, family.model(fields), "model.")
    vocab_size = fields.get("vocab_size")
    std = float(fields.get("initializer_range", 0.02))
    common = {
        "d_model": fields.get("hidden_size"),
        "mlp_dim": fields.get("intermediate_size"),
        "num_heads": fields.get("num_attention_heads"),
        "num_kv_heads": fields.get("num_key_value_heads", fields.get("num_attention_heads")),
        "head_dim": fields.get("head_dim", fields.get("hidden_size") // fields.get("num_attention_heads")),
        "norm_eps": float(fields.get("rms_norm_eps", 1e-6)),
        "vocab_multiple": vocab_size,
        "tie_embeddings": bool(fields.get("tie_word_embeddings", is_tied)),
        "init_std": std,
        "embedding_init_std": std,
    }
    theta, share = fields.rope()
    values = {**common, "rope_theta": theta, "rotary_fraction": share, **family.model(fields)}
    return from_dict(ModelConfig, values, "model.")


def pairs_of(family: Family, config: ModelConfig, names: Iterable[str]) -> list[Pair]:
    """Every weight of ours (``names``) once, in the order in which a checkpoint is written."""
    if family.mixer is None:
        return [pair(name, name) for name in names]
    pairs = [pair("model.embed_tokens.weight", "embed.weight")]
    for i, spec in enumerate(config.blocks):
        theirs, ours = f"model.layers.{i}.", f"stack.blocks.{i}."
        for name, own in family.norms(spec).items():
            pairs.append(pair(f"{theirs}{name}.weight", f"{ours}{own}.weight"))
        pairs += family.mixer(config, spec, theirs, f"{ours}mixer.")
        for name in ("gate_proj", "up_proj", "down_proj"):
            pairs.append(pair(f"{theirs}mlp.{name}.weight", f"{ours}mlp.{name}.weight"))
    pairs.append(pair("model.norm.weight", "final_norm.weight"))
    if not config.tie_embeddings:
        pairs.append(pair("lm_head.weight", "head.weight"))
    return pairs


def _same(theirs: str, ours: str, *names: str) -> Iterator[Pair]:
    for name in names:
        yield pair(theirs + name, ours + name)


def _pattern(fields: Fields, words: dict[str, str], default: list[str] | None = None) -> str:
    """Our word for each of their layers."""
    kinds = fields.get("layer_types", default or ["full_attention"] * fields.get("num_hidden_layers"))
    if len(kinds) != fields.get("num_hidden_layers"):
        fields.refuse(
            "layer_types", kinds, f"it names {len(kinds)} layers of {fields.get('num_hidden_layers')}"
        )
    for kind in kinds:
        if kind not in words:
            fields.refuse("layer_types", kind, f"the layers known are {', '.join(sorted(words))}")
    return " ".join(words[kind] for kind in kinds)


# Llama, Qwen2, Qwen3: attention everywhere, some of it perhaps in a sliding window.


def _attention_words(fields: Fields) -> dict[str, str]:
    width = fields.get("sliding_window", None) if fields.get("use_sliding_window", True) else None
    return {"full_attention": "attn"} | ({"sliding_attention": f"swa:{width}"} if width else {})


def _dense(fields: Fields) -> dict[str, Any]:
    default = None
    if fields.get("sliding_window", None) and fields.get("use_sliding_window", False):
        first = fields.get("max_window_layers", 28)
        kinds = ("full_attention", "sliding_attention")
        default = [kinds[i >= first] for i in range(fields.get("num_hidden_layers"))]
    return {"pattern": _pattern(fields, _attention_words(fields), default)}


def _llama(fields: Fields) -> dict[str, Any]:
    fields.require("attention_bias", False, _O_BIAS)
    return _dense(fields)


def _qwen2(fields: Fields) -> dict[str, Any]:
    return _dense(fields) | {"attention_bias": True}


def _qwen3(fields: Fields) -> dict[str, Any]:
    return _llama(fields) | {"qk_norm": "head"}


def _attention(config: ModelConfig, spec: BlockSpec, theirs: str, ours: str) -> Iterator[Pair]:
    names = [f"{name}.weight" for name in _QKVO]
    if config.attention_bias:
        names += [f"{name}.bias" for name in _QKVO[:3]]
    if config.qk_norm == "head":
        names += ["q_norm.weight", "k_norm.weight"]
    yield from _same(f"{theirs}self_attn.", ours, *names)


# Ouro (arXiv 2510.25741): Llama with sandwich norms, whose normalised output goes round again.


def _ouro(fields: Fields) -> dict[str, Any]:
    return _llama(fields) | {"norm_placement": "sandwich"}


# Jet-Nemotron (arXiv 2508.15884): Qwen2.5 with Jet blocks in place of most attention.


def _jet_nemotron(fields: Fields) -> dict[str, Any]:
    mixers = fields.inside("efficient_attention_config")
    jet = mixers.inside("jet")
    words = {"attn": "attn", "jet": "jet"}
    if "swa" in mixers.values:
        words["swa"] = f"swa:{mixers.inside('swa').get('window_size')}"
    key_dim = jet.get("head_dim")
    return {
        "pattern": _pattern(fields, words),
        "attention_bias": True,
        "memory_heads": jet.get("num_heads"),
        "memory_key_dim": key_dim,
        "memory_value_dim": int(key_dim * float(jet.get("expand_v"))),
        "memory_norm_eps": float(jet.get("norm_eps", 1e-5)),
        "conv_width": jet.get("conv_size", 4),
        "jet_reduction": jet.get("dconv_generator_reduction", 8),
    }


def _jet_or_attention(config: ModelConfig, spec: BlockSpec, theirs: str, ours: str) -> Iterator[Pair]:
    if not spec.is_fast_weight:
        yield from _attention(config, spec, theirs, ours)
        return
    theirs = f"{theirs}self_attn."
    linears = [f"{letter}_proj.weight" for letter in "qkvbago"]
    yield from _same(theirs, ours, *linears, "A_log", "dt_bias", "o_norm.weight")
    kernels = f"{theirs}dynamic_conv1d.kernel_generator."
    yield pair(f"{kernels}w1.weight", f"{ours}kernel_in.weight")
    yield pair(f"{kernels}w2.weight", f"{ours}kernel_out.weight")
    yield pair(f"{kernels}w2.bias", f"{ours}kernel_out.bias")


# Qwen3.5 (dense): Gated DeltaNet, and attention with a gate and few rotating channels; norms times 1 + w.


def _linear_words(fields: Fields) -> dict[str, str]:
    return {"linear_attention": "gdn", "full_attention": "attn"}


def _memory_sizes(fields: Fields) -> dict[str, Any]:
    return {
        "memory_heads": fields.get("linear_num_value_heads"),
        "memory_qk_heads": fields.get("linear_num_key_heads"),
        "memory_key_dim": fields.get("linear_key_head_dim"),
        "memory_value_dim": fields.get("linear_value_head_dim"),
        "conv_width": fields.get("linear_conv_kernel_dim", 4),
    }


def _qwen3_5(fields: Fields) -> dict[str, Any]:
    fields.require("attention_bias", False, _O_BIAS)
    every, count = fields.get("full_attention_interval", 4), fields.get("num_hidden_layers")
    default = ["linear_attention" if (i + 1) % every else "full_attention" for i in range(count)]
    given = fields.get("rope_parameters", None) or {}
    share = given.get("partial_rotary_factor", fields.get("partial_rotary_factor", 0.25))
    return {
        "pattern": _pattern(fields, _linear_words(fields), default),
        "attention_gate": True,
        "qk_norm": "head",
        "rotary_fraction": float(share),
        "zero_centred_norms": True,
        **_memory_sizes(fields),
    }


def _qwen3_5_mixer(config: ModelConfig, spec: BlockSpec, theirs: str, ours: str) -> Iterator[Pair]:
    if spec.is_fast_weight:
        theirs = f"{theirs}linear_attn."
        letters = ("q", "k", "v")
        yield pair(f"{theirs}in_proj_qkv.weight", *(f"{ours}{x}_proj.weight" for x in letters))
        yield pair(f"{theirs}conv1d.weight", *(f"{ours}{x}_conv" for x in letters), is_kernel=True)
        for name, own in (("in_proj_z", "g_proj"), ("in_proj_b", "b_proj"), ("in_proj_a", "a_proj")):
            yield pair(f"{theirs}{name}.weight", f"{ours}{own}.weight")
        yield from _same(theirs, ours, "A_log", "dt_bias")
        yield pair(f"{theirs}norm.weight", f"{ours}o_norm.weight")
        yield pair(f"{theirs}out_proj.weight", f"{ours}o_proj.weight")
        return
    theirs = f"{theirs}self_attn."
    both = (f"{ours}q_proj.weight", f"{ours}g_proj.weight")
    # Of each head its query, then its gate.
    yield pair(f"{theirs}q_proj.weight", *both, groups=config.num_heads)
    yield from _same(theirs, ours, *(f"{name}.weight" for name in (*_QKVO[1:], "q_norm", "k_norm")))


# OLMo Hybrid: Gated DeltaNet with negative eigenvalues behind norms, attention before norms, no positions.


def _olmo_hybrid(fields: Fields) -> dict[str, Any]:
    fields.require("attention_bias", False, _O_BIAS)
    count = fields.get("num_hidden_layers")
    default = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(count)]
    return {
        "pattern": _pattern(fields, _linear_words(fields), default),
        "qk_norm": "width",
        "norm_placement": "mixed",
        "negative_eigenvalues": bool(fields.get("linear_allow_neg_eigval", True)),
        "memory_norm_eps": 1e-5,
        **({"rotary_fraction": 0.0} if fields.get("rope_parameters", None) is None else {}),
        **_memory_sizes(fields),
    }


def _olmo_hybrid_mixer(config: ModelConfig, spec: BlockSpec, theirs: str, ours: str) -> Iterator[Pair]:
    if spec.is_fast_weight:
        theirs = f"{theirs}linear_attn."
        linears = [f"{letter}_proj.weight" for letter in "qkvbago"]
        yield from _same(theirs, ours, *linears, "A_log", "dt_bias", "o_norm.weight")
        # transformers writes the three as equal parts of one, whatever the sizes of queries, keys and values.
        names = tuple(f"{theirs}{letter}_conv1d.weight" for letter in "qkv")
        yield Pair(names, tuple(f"{ours}{letter}_conv" for letter in "qkv"), is_kernel=True)
        return
    theirs = f"{theirs}self_attn."
    yield from _same(theirs, ours, *(f"{name}.weight" for name in _QKVO))
    for letter in "qk":
        yield pair(f"{theirs}{letter}_norm.weight", f"{ours}{letter}_width_norm.weight")


# What the export of a sleeping model writes: our settings and our names (sleeping.py).

SLEEPING = "sleeptrain"
_SLEEPING = Family(
    lambda fields: fields.inside("model").values,
    mixer=None,
    sleep=lambda fields: fields.inside("sleep").values,
)

_QWEN3_5 = Family(
    _qwen3_5,
    _qwen3_5_mixer,
    left_out=("mtp.*", "model.visual.*"),  # a head for several tokens ahead; eyes
    renamed=((r"^model\.language_model\.", "model."),),
)

FAMILIES: dict[str, Family] = {
    "llama": Family(_llama, _attention),
    "qwen2": Family(_qwen2, _attention),
    "qwen3": Family(_qwen3, _attention),
    SLEEPING: _SLEEPING,
    "ouro": Family(
        _ouro,
        _attention,
        norms=lambda spec: _SANDWICH,
        kept=("model.early_exit_gate.*",),
        sleep=lambda fields: {"norm_between_passes": True},
    ),
    "jet_nemotron": Family(_jet_nemotron, _jet_or_attention),
    "qwen3_5": _QWEN3_5,
    "qwen3_5_text": _QWEN3_5,
    "olmo_hybrid": Family(
        _olmo_hybrid,
        _olmo_hybrid_mixer,
        norms=lambda spec: _NORMS if spec.is_fast_weight else _POST,
        renamed=(
            (r"\.attention_layer_norm\.", ".input_layernorm."),
            (r"\.feedforward_layer_norm\.", ".post_attention_layernorm."),
        ),
    ),
}
