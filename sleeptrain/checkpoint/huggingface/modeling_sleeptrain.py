"""A language model that sleeps: when its window is full it passes over it N times, writes it into fast
weights, and clears its KV cache.

This file needs torch and transformers 5 alone; it lies beside the weights that it is for. It computes what
sleeptrain, which trained them, does (method: arXiv 2605.26099), in plain PyTorch.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    model.generate(ids, max_new_tokens=50)        # sleeps whenever a window is full
    out = model(ids, num_passes=4)                # the same, with another N; out.cache: what it remembers
    model(more_ids, cache=out.cache)              # reads on; without gradients it holds no more than a window

Shape letters: B batch, T tokens of this call, S stored tokens, P tokens in the open window, D model width,
H value heads, G key/value heads, K key size, V value size, C channels, W convolution taps.

Over 400 lines because it is read and run away from sleeptrain, with no other file beside it.
"""

import sys
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# What transformers calls what a model remembers: past_key_values in its older versions.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
CHUNK_TOKENS = 64


class SleeptrainConfig(PreTrainedConfig):
    """``model``: sizes and blocks, ``sleep``: when and how often it sleeps; both under sleeptrain's names."""

    model_type = "sleeptrain"

    def __init__(
        self, model: dict[str, Any] | None = None, sleep: dict[str, Any] | None = None, **others: Any
    ) -> None:
        self.model, self.sleep = model or {}, sleep or {}
        super().__init__(**others)


class Held(NamedTuple):
    """What a block holds: fast weights ``[B, H, K, V]`` and convolution tail ``[B, W-1, C]``, or keys
    (unrotated) and values ``[B, S, G, head]`` of the newest tokens. A pass reads and leaves at most one pair
    of these; across a border those of several passes may survive."""

    weights: Tensor | None = None
    tail: Tensor | None = None
    caches: tuple[tuple[Tensor, Tensor], ...] = ()


class SleepMemory:
    """What the model remembers, of which it has one for each batch: its size is bounded by a window.

    ``start``: what the blocks held at the start of the open window. ``state``: the same after what was read
    in it so far. ``hidden`` ``[B, P, D]``: what reading left. ``num_tokens``: read in all, by each sequence.
    """

    is_compileable, is_croppable, is_linear = False, False, (True,)  # transformers asks for these

    def __init__(self, start: list[Held], hidden: Tensor) -> None:
        self.num_tokens = 0
        self.open(start, hidden)

    def open(self, start: list[Held], hidden: Tensor) -> None:
        """A new window. Reading it sees the keys of the last pass over the one before."""
        self.start, self.hidden = start, hidden
        self.state = [held._replace(caches=held.caches[-1:]) for held in start]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, whether still in the cache or not."""
        return self.num_tokens

    def reorder_cache(self, rows: Tensor) -> None:
        """Beam search goes on from these rows."""
        self.start, self.state, self.hidden = (_rows(x, rows) for x in (self.start, self.state, self.hidden))


def _rows(tree: Any, rows: Tensor) -> Any:
    if isinstance(tree, Tensor):
        return tree.index_select(0, rows)
    if isinstance(tree, Held):
        return Held(*(_rows(part, rows) for part in tree))
    return type(tree)(_rows(part, rows) for part in tree) if isinstance(tree, (list, tuple)) else tree


class RMSNorm(nn.Module):
    """Times a weight; zero-centred, times 1 + weight."""

    def __init__(self, dim: int, eps: float, zero_centred: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim) if zero_centred else torch.ones(dim))
        self.eps, self.zero_centred = eps, zero_centred

    def forward(self, x: Tensor) -> Tensor:
        factor = 1 + self.weight if self.zero_centred else self.weight
        return F.rms_norm(x, factor.shape, factor, self.eps)


class GatedMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotate(x: Tensor, first: int, rotary_dim: int, theta: float) -> Tensor:
    """Rotary embedding of ``x`` ``[B, T, H, head]`` whose tokens have the places ``first``, ``first + 1`` ...
    in the window (negative: before it), halves paired; channels behind ``rotary_dim`` stay as they are."""
    half, dtype = rotary_dim // 2, torch.promote_types(x.dtype, torch.float32)
    places = torch.arange(first, first + x.shape[1], device=x.device, dtype=torch.float64)
    exponent = torch.arange(half, device=x.device, dtype=torch.float64) / max(1, half)
    angles = places[:, None, None] * theta**-exponent
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    one, two, rest = x.split([half, half, x.shape[-1] - rotary_dim], dim=-1)
    turned = torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


def convolve(x_BTC: Tensor, kernels: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution with SiLU, by ``kernels`` ``[C, W]``, or ``[B, T, C, W]`` where each token
    has its own; and the newest W - 1 inputs, from which the next call starts."""
    size = kernels.shape[-1] - 1
    if tail is None:
        tail = x_BTC.new_zeros(len(x_BTC), size, x_BTC.shape[-1])
    inputs = torch.cat([tail, x_BTC], dim=1)
    mixed = (inputs.unfold(1, size + 1, 1) * kernels).sum(-1)
    return F.silu(mixed), inputs[:, inputs.shape[1] - size :]


def apply_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, erases: bool
) -> tuple[Tensor, Tensor]:
    """The fast weights at work, chunk by chunk: for each token S <- a S; S <- S + k u^T with
    u = b (v - S^T k), or b v where the rule does not erase; o = S^T q.

    q, k ``[B, T, H, K]``, v ``[B, T, H, V]``, log decay and b ``[B, T, H]``, ``state`` ``[B, H, K, V]``, all
    of at least float32; returns o ``[B, T, H, V]`` and the state after the last token. Inside of a chunk the
    u solve a triangular system, since each of them reads the ones before it.
    """
    outs = []
    chunks = (x.transpose(1, 2).split(CHUNK_TOKENS, dim=2) for x in (q, k, v, log_decay, beta[..., None]))
    for q_BHTK, k_BHTK, v_BHTV, log_BHT, b_BHT1 in zip(*chunks):
        total = log_BHT.double().cumsum(-1)  # differences must survive very unequal decays
        between = (total[..., :, None] - total[..., None, :]).exp().tril()  # from token j to token i >= j
        between, from_start = between.to(state.dtype), total.exp()[..., None].to(state.dtype)
        to_end = (total[..., -1:] - total).exp()[..., None].to(state.dtype)
        u_BHTV = b_BHT1 * v_BHTV
        if erases:
            right = u_BHTV - b_BHT1 * from_start * (k_BHTK @ state)
            left = b_BHT1 * between * (k_BHTK @ k_BHTK.mT)
            u_BHTV = torch.linalg.solve_triangular(left, right, upper=False, unitriangular=True)
        outs.append(from_start * (q_BHTK @ state) + (between * (q_BHTK @ k_BHTK.mT)) @ u_BHTV)
        state = from_start[..., -1:, :] * state + (k_BHTK * to_end).mT @ u_BHTV
    return torch.cat(outs, dim=2).transpose(1, 2), state


class FastWeight(nn.Module):
    """What gdn and jet blocks share: gates, the rule, the gated norm of what it gives."""

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        self.key_dim, self.value_dim = model["memory_key_dim"], model["memory_value_dim"]
        self.num_heads, self.decays = model["memory_heads"], model["rule"] != "delta"
        self.erases = model["rule"] != "gated_hebbian"
        self.strength = 2.0 if model["negative_eigenvalues"] else 1.0
        width, values = model["d_model"], self.num_heads * self.value_dim
        self.q_proj = nn.Linear(width, model["memory_qk_heads"] * self.key_dim, bias=False)
        self.k_proj = nn.Linear(width, model["memory_qk_heads"] * self.key_dim, bias=False)
        self.v_proj = nn.Linear(width, values, bias=False)
        self.b_proj = nn.Linear(width, self.num_heads, bias=False)
        if self.decays:
            self.a_proj = nn.Linear(width, self.num_heads, bias=False)
            self.A_log = nn.Parameter(torch.zeros(self.num_heads))
            self.dt_bias = nn.Parameter(torch.zeros(self.num_heads))
        self.g_proj = nn.Linear(width, values, bias=False)
        self.o_norm = RMSNorm(self.value_dim, model["memory_norm_eps"])
        self.o_proj = nn.Linear(values, width, bias=False)

    def forward(self, x_BTD: Tensor, held: Held, place: int, length: int) -> tuple[Tensor, Held]:
        q, k, v, tail = self.queries_keys_values(x_BTD, held.tail)
        q, k = (self._heads(x, self.key_dim) for x in (q, k))
        v = v.unflatten(-1, (-1, self.value_dim))
        log_decay, beta = self._gates(x_BTD)
        assert held.weights is not None  # new_memory gives each of these blocks some
        out, weights = apply_rule(
            q * self.key_dim**-0.5, k, at_least_float32(v), log_decay, beta, held.weights, self.erases
        )
        gate = F.silu(self.g_proj(x_BTD)).unflatten(-1, (-1, self.value_dim))
        return self.o_proj((self.o_norm(out.to(v.dtype)) * gate).flatten(2)), Held(weights, tail)

    def queries_keys_values(
        self, x_BTD: Tensor, tail: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Channels ``[B, T, C]`` of each, and the convolution tail."""
        raise NotImplementedError

    def _heads(self, x_BTC: Tensor, size: int) -> Tensor:
        """Of length 1, one for each head of the values."""
        x = at_least_float32(x_BTC.unflatten(-1, (-1, size)))
        x = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
        return x.repeat_interleave(self.num_heads // x.shape[2], dim=2)

    def _gates(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Log decay and write strength ``[B, T, H]``."""
        x = at_least_float32(x_BTD)
        beta = self.strength * torch.sigmoid(F.linear(x, self.b_proj.weight.to(x.dtype)))
        if not self.decays:
            return torch.zeros_like(beta), beta
        rates = F.softplus(F.linear(x, self.a_proj.weight.to(x.dtype)) + self.dt_bias.to(x.dtype))
        return -self.A_log.to(x.dtype).exp() * rates, beta


class GDN(FastWeight):
    """Gated-delta-net block: a short convolution each of q, k and v (arXiv 2412.06464)."""

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__(model)
        taps = model["conv_width"]
        self.q_conv = nn.Parameter(torch.zeros(self.q_proj.out_features, taps))
        self.k_conv = nn.Parameter(torch.zeros(self.k_proj.out_features, taps))
        self.v_conv = nn.Parameter(torch.zeros(self.v_proj.out_features, taps))

    def queries_keys_values(
        self, x_BTD: Tensor, tail: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        channels = torch.cat([self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)], dim=-1)
        mixed, tail = convolve(channels, torch.cat([self.q_conv, self.k_conv, self.v_conv]), tail)
        q, k, v = mixed.split([len(self.q_conv), len(self.k_conv), len(self.v_conv)], dim=-1)
        return q, k, v, tail


class Jet(FastWeight):
    """Jet block: a convolution of v alone, whose kernels every token makes for itself (arXiv 2508.15884)."""

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__(model)
        values, self.conv_width = self.v_proj.out_features, model["conv_width"]
        self.kernel_in = nn.Linear(model["d_model"], max(1, values // model["jet_reduction"]), bias=False)
        self.kernel_out = nn.Linear(self.kernel_in.out_features, values * self.conv_width)

    def queries_keys_values(
        self, x_BTD: Tensor, tail: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        kernels = self.kernel_out(F.silu(self.kernel_in(x_BTD))).unflatten(-1, (-1, self.conv_width))
        v, tail = convolve(self.v_proj(x_BTD), kernels, tail)
        return F.silu(self.q_proj(x_BTD)), F.silu(self.k_proj(x_BTD)), v, tail


class Attention(nn.Module):
    """Attention inside a band of ``width`` tokens, or of the window's length."""

    def __init__(self, model: dict[str, Any], width: int | None) -> None:
        super().__init__()
        self.width, self.theta, self.head_dim = width, model["rope_theta"], model["head_dim"]
        self.rotary_dim = int(self.head_dim * model["rotary_fraction"])
        query, key = model["num_heads"] * self.head_dim, model["num_kv_heads"] * self.head_dim
        self.q_proj = nn.Linear(model["d_model"], query, bias=model["attention_bias"])
        self.k_proj = nn.Linear(model["d_model"], key, bias=model["attention_bias"])
        self.v_proj = nn.Linear(model["d_model"], key, bias=model["attention_bias"])
        self.o_proj = nn.Linear(query, model["d_model"], bias=False)
        self.g_proj = nn.Linear(model["d_model"], query, bias=False) if model["attention_gate"] else None

        def norm(kind: str, size: int) -> nn.Module:
            return norm_of(model, size) if model["qk_norm"] == kind else nn.Identity()

        self.q_width_norm, self.k_width_norm = norm("width", query), norm("width", key)
        self.q_norm, self.k_norm = norm("head", self.head_dim), norm("head", self.head_dim)

    def forward(self, x_BTD: Tensor, held: Held, place: int, length: int) -> tuple[Tensor, Held]:
        q = self.q_norm(self._heads(self.q_width_norm(self.q_proj(x_BTD))))
        keys = self.k_norm(self._heads(self.k_width_norm(self.k_proj(x_BTD))))
        values = self._heads(self.v_proj(x_BTD))
        for old_keys, old_values in held.caches:
            keys, values = torch.cat([old_keys, keys], dim=1), torch.cat([old_values, values], dim=1)
        band, stored = self.width or length, keys.shape[1] - q.shape[1]
        kept = slice(max(0, keys.shape[1] - band + 1), None)
        rotated_q = rotate(q, place, self.rotary_dim, self.theta)
        rotated_keys = rotate(keys, place - stored, self.rotary_dim, self.theta)
        is_plain = not stored and q.shape[1] <= band
        out = F.scaled_dot_product_attention(
            rotated_q.transpose(1, 2),
            rotated_keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=None if is_plain else _band(q.shape[1], stored, band, x_BTD.device),
            is_causal=is_plain,
            enable_gqa=q.shape[2] != keys.shape[2],
        )
        out_BTC = out.transpose(1, 2).flatten(2)
        if self.g_proj is not None:
            out_BTC = out_BTC * torch.sigmoid(self.g_proj(x_BTD))
        return self.o_proj(out_BTC), Held(caches=((keys[:, kept], values[:, kept]),))

    def _heads(self, x_BTC: Tensor) -> Tensor:
        return x_BTC.unflatten(-1, (-1, self.head_dim))


def _band(num_tokens: int, stored: int, band: int, device: torch.device) -> Tensor:
    """True where a token may look ``[T, S + T]``: at itself and ``band`` - 1 earlier ones."""
    places = torch.arange(stored + num_tokens, device=device)
    distance = places[stored:, None] - places
    return (distance >= 0) & (distance < band)


def norm_of(model: dict[str, Any], size: int) -> RMSNorm:
    return RMSNorm(size, model["norm_eps"], model["zero_centred_norms"])


class Block(nn.Module):
    """h + mixer(norm(h)), then h + mlp(norm(h)), where it has one; the norms stand before, after, or both."""

    def __init__(self, model: dict[str, Any], word: str) -> None:
        super().__init__()
        kind, _, width = word.partition(":")
        is_fast = kind in ("gdn", "jet")
        before = is_fast or model["norm_placement"] != "mixed"
        after = not is_fast and model["norm_placement"] != "pre"

        def norm(is_here: bool) -> nn.Module:
            return norm_of(model, model["d_model"]) if is_here else nn.Identity()

        self.mixer_norm, self.mixer_out_norm = norm(before), norm(after)
        kinds: dict[str, type[FastWeight]] = {"gdn": GDN, "jet": Jet}
        self.mixer = kinds[kind](model) if is_fast else Attention(model, int(width) if width else None)
        self.mlp = None
        if model["memory_mlp"] or not is_fast:
            self.mlp_norm, self.mlp_out_norm = norm(before), norm(after)
            self.mlp = GatedMLP(model["d_model"], model["mlp_dim"])

    def forward(self, h_BTD: Tensor, held: Held, place: int, length: int) -> tuple[Tensor, Held]:
        """Tokens from ``place`` of a window of ``length`` tokens on, and what the block held before them."""
        mixed, held = self.mixer(self.mixer_norm(h_BTD), held, place, length)
        h_BTD = h_BTD + self.mixer_out_norm(mixed)
        if self.mlp is not None:
            h_BTD = h_BTD + self.mlp_out_norm(self.mlp(self.mlp_norm(h_BTD)))
        return h_BTD, held


class Stack(nn.Module):
    """Blocks from bottom to top."""

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(model, word) for word in model["pattern"].split())


class SleeptrainForCausalLM(PreTrainedModel, GenerationMixin):
    """Embedding, blocks, final norm and head, and the sleep between windows.

    The blocks of the prelude and the coda, at either end, run once over a window, those of the core N times.
    """

    config_class = SleeptrainConfig
    _no_split_modules = ["Block"]  # noqa: RUF012 (transformers looks for a list)
    _tied_weights_keys = {"head.weight": "embed.weight"}  # noqa: RUF012 (transformers looks for a dict)
    _is_stateful = True  # what was slept on cannot be taken back

    def __init__(self, config: SleeptrainConfig) -> None:
        super().__init__(config)
        model, self.settings = config.model, config.sleep
        self.embed = nn.Embedding(model["vocab_multiple"], model["d_model"])
        self.stack = Stack(model)
        self.final_norm = norm_of(model, model["d_model"])
        self.head = nn.Linear(model["d_model"], model["vocab_multiple"], bias=False)
        num_blocks = len(self.stack.blocks)
        self.prelude = range(model["prelude_blocks"])
        self.core = range(model["prelude_blocks"], num_blocks - model["coda_blocks"])
        self.coda = range(self.core.stop, num_blocks)
        if self.settings["learned_initial_state"]:
            starts = {str(i): torch.zeros(shape) for i, shape in self._memory_shapes().items()}
            self.initial_memory = nn.ParameterDict(starts)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: SleepMemory | None = None,
        past_key_values: SleepMemory | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_passes: int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Reads ``input_ids`` ``[B, T]`` on from ``cache`` (or its older name), which it changes in place,
        and sleeps with N = ``num_passes`` (None: as in the config) whenever a window is full.

        ``labels`` are the ids themselves, shifted here. Raises ValueError for an N that cannot be, and for a
        mask with pads.
        """
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError("attention_mask has zeros, and pads are not known here; give rows of one length")
        num_passes = self._passes(num_passes)
        memory = cache if cache is not None else past_key_values
        memory = self.new_memory(len(input_ids)) if memory is None else memory
        left = []
        while input_ids.shape[1]:
            room = self._window_tokens - memory.hidden.shape[1]
            left.append(self._read(memory, input_ids[:, :room]))
            input_ids = input_ids[:, room:]
            if memory.hidden.shape[1] == self._window_tokens:
                self.sleep(memory, num_passes)
        h_BTD = torch.cat(left, dim=1)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = at_least_float32(self.head(self.final_norm(h_BTD[:, kept])))
        loss = None if labels is None else self.loss_function(logits, labels, logits.shape[-1])
        remembered = {CACHE: None if use_cache is False else memory}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **remembered)

    def new_memory(self, num_sequences: int) -> SleepMemory:
        """Of a model that has read nothing: zero or learned fast weights."""
        weight = self.embed.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        start = [Held()] * len(self.stack.blocks)
        for i, shape in self._memory_shapes().items():
            zeros = torch.zeros(num_sequences, *shape, dtype=dtype, device=weight.device)
            learned = self.settings["learned_initial_state"]
            start[i] = Held(weights=zeros + self.initial_memory[str(i)] if learned else zeros)
        return SleepMemory(start, weight.new_zeros(num_sequences, 0, weight.shape[1]))

    def sleep(self, memory: SleepMemory, num_passes: int | None = None) -> None:
        """Passes 2..N over the open window, full or not, then forgets it: only fast weights cross its border,
        with sliding eviction keys and values, too, and convolution tails where they are carried."""
        num_passes, num_tokens = self._passes(num_passes), memory.hidden.shape[1]
        h_BTD, latest = memory.hidden, list(memory.state)
        caches = [held.caches for held in latest]  # of each pass, where reading was the first
        length = self.settings["window_tokens"] or num_tokens

        def again(blocks: range, h_BTD: Tensor, pass_number: int) -> Tensor:
            for i in blocks:
                start = memory.start[i]
                seen = start.caches[min(pass_number, len(start.caches)) - 1 :][:1]
                tail = start.tail if i in self.coda else None  # the first pass over a window alone has one
                held = Held(latest[i].weights, tail, seen)
                h_BTD, latest[i] = self.stack.blocks[i](h_BTD, held, 0, length)
                caches[i] += latest[i].caches
            return h_BTD

        coda = self.coda if self.settings["schedule"] == "consolidate_or_predict" else range(0)
        for i in coda:  # what it wrote awake is taken back: it runs once, after the last pass of the core
            latest[i], caches[i] = memory.start[i], ()
        for pass_number in range(2, num_passes + 1) if num_tokens else ():
            entering = self.final_norm(h_BTD) if self.settings["norm_between_passes"] else h_BTD
            h_BTD = again(self.core, entering, pass_number)
        if num_tokens:
            again(coda, h_BTD, num_passes)
            start = [self._surviving(held, of_passes) for held, of_passes in zip(latest, caches)]
            memory.open(start, memory.hidden[:, :0])

    def _surviving(self, held: Held, caches: tuple[tuple[Tensor, Tensor], ...]) -> Held:
        if self.settings["eviction"] == "hard":
            caches = ()
        elif self.settings["sliding_kv"] == "last_pass":
            caches = caches[-1:]
        return Held(held.weights, held.tail if self.settings["convolution"] == "carried" else None, caches)

    def _read(self, memory: SleepMemory, ids: Tensor) -> Tensor:
        """Pass 1 over the next tokens of the open window; returns h ``[B, T, D]``."""
        h_BTD, place = self.embed(ids), memory.hidden.shape[1]
        for i, block in enumerate(self.stack.blocks):
            h_BTD, memory.state[i] = block(h_BTD, memory.state[i], place, self._window_tokens)
            if i == self.core[-1]:
                memory.hidden = torch.cat([memory.hidden, h_BTD], dim=1)
        memory.num_tokens += ids.shape[1]
        return h_BTD

    @property
    def _window_tokens(self) -> int:
        return self.settings["window_tokens"] or sys.maxsize

    def _passes(self, num_passes: int | None) -> int:
        chosen = self.settings["num_passes"] if num_passes is None else num_passes
        writes = any(isinstance(self.stack.blocks[i].mixer, FastWeight) for i in self.core)
        if chosen < 1 or (chosen > 1 and not writes):
            limit = "at least 1" if chosen < 1 else "1: no block that loops has fast weights"
            raise ValueError(f"num_passes={chosen} must be {limit}")
        return chosen

    def _memory_shapes(self) -> dict[int, tuple[int, int, int]]:
        """Of the fast weights ``[H, K, V]`` by block."""
        mixers = [(i, block.mixer) for i, block in enumerate(self.stack.blocks)]
        return {i: (m.num_heads, m.key_dim, m.value_dim) for i, m in mixers if isinstance(m, FastWeight)}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """The first call of ``generate`` makes a SleepMemory instead."""
        return False

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        cache: SleepMemory | None = None,
        past_key_values: SleepMemory | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What was not read yet: ``input_ids`` are always all of a sequence."""
        memory = cache if cache is not None else past_key_values
        if memory is not None and memory.num_tokens >= input_ids.shape[1]:
            raise ValueError(
                f"{input_ids.shape[1]} ids with a memory of {memory.num_tokens} tokens leave nothing to read;"
                " give generate the whole sequence, what was read included"
            )
        wanted = ("attention_mask", "use_cache", "logits_to_keep", "num_passes")
        inputs = {name: kwargs[name] for name in wanted if name in kwargs}
        return inputs | {"input_ids": input_ids[:, memory.num_tokens if memory else 0 :], CACHE: memory}
