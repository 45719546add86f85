"""Checkpoints of Ouro and Jet-Nemotron, from the published configs and weight names: full-sized ones without
contents, tiny ones with random weights, and what these predict, in plain torch.

Nothing here is taken from the code under test.
"""

import json
import math
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
OURO: dict[str, Any] = {
    "architectures": ["OuroForCausalLM"],
    "model_type": "ouro",
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "intermediate_size": 5632,
    "vocab_size": 49152,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": None,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "total_ut_steps": 4,
    "early_exit_threshold": 1.0,
    "sliding_window": None,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
}
JET: dict[str, Any] = {
    "architectures": ["JetNemotronForCausalLM"],
    "model_type": "jet_nemotron",
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": None,
    "hidden_act": "silu",
    "efficient_attention_config": {
        "jet": {
            "conv_size": 4,
            "dconv_generator_reduction": 8,
            "expand_v": 2.6666666667,
            "head_dim": 96,
            "norm_eps": "1e-5",
            "num_heads": 12,
        },
        "swa": {"window_size": 1152},
    },
    "layer_types": [{14: "attn", 19: "attn", 20: "swa", 21: "swa"}.get(i, "jet") for i in range(28)],
    "torch_dtype": "bfloat16",
}
TINY = {"hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 40, "vocab_size": 62}
TINY_OURO = (
    OURO | TINY | {"num_key_value_heads": 4, "head_dim": 6, "num_hidden_layers": 4, "rope_theta": 500.0}
)
TINY_JET = JET | TINY | {
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "layer_types": ["jet", "attn", "swa", "jet"],
    "efficient_attention_config": {
        "jet": {**JET["efficient_attention_config"]["jet"], "head_dim": 6, "num_heads": 4},
        "swa": {"window_size": 5},
    },
}  # fmt: skip


def jet_sizes(config: dict[str, Any]) -> tuple[int, int, int, int]:
    """Heads, their key and value sizes, and the width of the layer that makes kernels."""
    jet = config["efficient_attention_config"]["jet"]
    heads, key = jet["num_heads"], jet["head_dim"]
    value = int(heads * key * jet["expand_v"]) // heads
    return heads, key, value, heads * value // jet["dconv_generator_reduction"]


def shapes_of(config: dict[str, Any]) -> Shapes:
    """Every tensor of the files."""
    width, hidden, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    is_ouro = config["model_type"] == "ouro"
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    if is_ouro:
        shapes |= {"lm_head.weight": (vocab, width)}
        shapes |= {"model.early_exit_gate.weight": (1, width), "model.early_exit_gate.bias": (1,)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{layer}{name}{end}.weight": (width,) for end in (("", "_2") if is_ouro else ("",))}
        shapes |= {f"{layer}mlp.{name}_proj.weight": (hidden, width) for name in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj.weight": (width, hidden)}
        is_jet = not is_ouro and config["layer_types"][i] == "jet"
        mixer = jet_shapes(config) if is_jet else attention_shapes(config, has_bias=not is_ouro)
        shapes |= {f"{layer}self_attn.{name}": shape for name, shape in mixer.items()}
    return shapes


def attention_shapes(config: dict[str, Any], has_bias: bool) -> Shapes:
    width, heads, groups = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    size = width // heads
    rows = {"q": heads * size, "k": groups * size, "v": groups * size}
    shapes: Shapes = {f"{x}_proj.weight": (n, width) for x, n in rows.items()}
    shapes |= {f"{x}_proj.bias": (n,) for x, n in rows.items() if has_bias}
    return shapes | {"o_proj.weight": (width, heads * size)}


def jet_shapes(config: dict[str, Any]) -> Shapes:
    width, taps = config["hidden_size"], config["efficient_attention_config"]["jet"]["conv_size"]
    heads, key, value, hidden = jet_sizes(config)
    rows = {
        "q": heads * key,
        "k": heads * key,
        "v": heads * value,
        "g": heads * value,
        "a": heads,
        "b": heads,
    }
    shapes: Shapes = {f"{x}_proj.weight": (n, width) for x, n in rows.items()}
    kernels = "dynamic_conv1d.kernel_generator."
    shapes |= {f"{kernels}w1.weight": (hidden, width), f"{kernels}w2.weight": (heads * value * taps, hidden)}
    shapes |= {f"{kernels}w2.bias": (heads * value * taps,), "o_proj.weight": (width, heads * value)}
    return shapes | {"A_log": (heads,), "dt_bias": (heads,), "o_norm.weight": (value,)}


def write_sparse(folder: Path, config: dict[str, Any], shapes: Shapes) -> None:
    """The files of a model of any size: their contents are a hole, which takes no room on the disk."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


def write_tiny(folder: Path, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A folder with random weights, which come back."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    draw = torch.Generator().manual_seed(11)
    tensors = {}
    for name, shape in shapes_of(config).items():
        noise = torch.randn(shape, generator=draw)
        is_norm = "norm" in name
        tensors[name] = (1 + 0.2 * noise if is_norm else 0.3 * noise).to(dtype)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors


def predict(config: dict[str, Any], weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Logits ``[B, T, V]`` of one loop over the layers, in float64."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    is_ouro, h = config["model_type"] == "ouro", weights["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        own = {name.removeprefix(layer): w for name, w in weights.items() if name.startswith(layer)}

        def norm(x: Tensor, name: str, own: dict[str, Tensor] = own) -> Tensor:
            return rms(x, config["rms_norm_eps"]) * own[f"{name}.weight"]

        mixer = {k.removeprefix("self_attn."): w for k, w in own.items() if k.startswith("self_attn.")}
        kind = "attn" if is_ouro else config["layer_types"][i]
        x = norm(h, "input_layernorm")
        mixed = jet_block(config, mixer, x) if kind == "jet" else attention(config, mixer, x, kind)
        h = h + (norm(mixed, "input_layernorm_2") if is_ouro else mixed)
        x = norm(h, "post_attention_layernorm")
        x = F.silu(x @ own["mlp.gate_proj.weight"].T) * (x @ own["mlp.up_proj.weight"].T)
        x = x @ own["mlp.down_proj.weight"].T
        h = h + (norm(x, "post_attention_layernorm_2") if is_ouro else x)
    head = weights["lm_head.weight" if is_ouro else "model.embed_tokens.weight"]
    return (rms(h, config["rms_norm_eps"]) * weights["model.norm.weight"]) @ head.T


def rms(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def attention(config: dict[str, Any], own: dict[str, Tensor], x: Tensor, kind: str) -> Tensor:
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size, length = config["hidden_size"] // heads, x.shape[1]

    def project(letter: str, count: int) -> Tensor:
        out = x @ own[f"{letter}_proj.weight"].T + own.get(f"{letter}_proj.bias", 0)
        return out.view(len(x), length, count, size)

    def turn(y: Tensor) -> Tensor:
        steps = torch.arange(size // 2, dtype=y.dtype) * 2 / size
        angle = torch.arange(length, dtype=y.dtype)[:, None] / config["rope_theta"] ** steps
        cos, sin = angle.cos()[None, :, None], angle.sin()[None, :, None]
        a, b = y[..., : size // 2], y[..., size // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    q, k, v = turn(project("q", heads)), turn(project("k", groups)), project("v", groups)
    k, v = (y.repeat_interleave(heads // groups, dim=2) for y in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / size**0.5
    back = torch.arange(length)[:, None] - torch.arange(length)
    width = config["efficient_attention_config"]["swa"]["window_size"] if kind == "swa" else length
    scores = scores.masked_fill((back < 0) | (back >= width), -torch.inf)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(2) @ own["o_proj.weight"].T


def jet_block(config: dict[str, Any], own: dict[str, Tensor], x: Tensor) -> Tensor:
    """Token by token, as described: dynamic kernels on v alone, gated delta rule, gated norm."""
    heads, key, value, _ = jet_sizes(config)
    batch, length = x.shape[:2]
    lin = {letter: x @ own[f"{letter}_proj.weight"].T for letter in "qkvabg"}
    q, k = (F.silu(lin[letter]).view(batch, length, heads, key) for letter in "qk")
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    kernels = "dynamic_conv1d.kernel_generator."
    made = F.silu(x @ own[f"{kernels}w1.weight"].T) @ own[f"{kernels}w2.weight"].T + own[f"{kernels}w2.bias"]
    taps = config["efficient_attention_config"]["jet"]["conv_size"]
    made = made.view(batch, length, heads * value, taps)
    beta, decay = (
        torch.sigmoid(lin["b"]),
        torch.exp(-own["A_log"].exp() * F.softplus(lin["a"] + own["dt_bias"])),
    )
    state, outs = torch.zeros(batch, heads, key, value, dtype=x.dtype), []
    for t in range(length):
        mixed = torch.zeros(batch, heads * value, dtype=x.dtype)
        for tap in range(taps):  # the last tap is the token itself
            source = t - (taps - 1 - tap)
            if source >= 0:
                mixed = mixed + made[:, t, :, tap] * lin["v"][:, source]
        v = F.silu(mixed).view(batch, heads, value)
        state = decay[:, t, :, None, None] * state
        read = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * (v - read))
        outs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * key**-0.5)
    eps = float(config["efficient_attention_config"]["jet"]["norm_eps"])
    out = rms(torch.stack(outs, dim=1), eps) * own["o_norm.weight"]
    return (out * F.silu(lin["g"]).view_as(out)).flatten(2) @ own["o_proj.weight"].T
