"""Section 1 of the method once more, for the tests: every visit computed, positions counted absolutely.

It takes weights from a SleepModel and nothing else: no pads (a row is run alone), no masks but distances,
every key and value kept for as long as any band may see it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sleeptrain.config import ModelConfig, SleepConfig
from sleeptrain.data.batch import Batch
from sleeptrain.memory import RULES, recurrent
from sleeptrain.model import SleepModel

VOCAB = 13
WINDOW = 5
SMALL = {
    "d_model": 8,
    "num_heads": 2,
    "num_kv_heads": 1,
    "memory_heads": 2,
    "memory_qk_heads": 1,
    "memory_key_dim": 4,
    "memory_value_dim": 3,
    "jet_reduction": 2,
    "mlp_dim": 8,
}
Spans = Sequence[tuple[int, int, bool]]


def build(
    pattern: str = "attn gdn attn gdn", dtype: torch.dtype = torch.float64, **settings: Any
) -> SleepModel:
    """A small model with weights large enough that every part matters; settings go where they belong."""
    sleep = {f.name: settings.pop(f.name) for f in fields(SleepConfig) if f.name in settings}
    model = SleepModel(
        ModelConfig(pattern=pattern, **SMALL | settings),
        SleepConfig(**{"window_tokens": WINDOW, "num_passes": 1} | sleep),
        VOCAB,
    ).to(dtype)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64).to(dtype)
            if "norm" in name:
                parameter += 0.1 * noise
            elif name.endswith("A_log"):
                parameter.copy_(-0.5 + 0.5 * noise)
            else:
                parameter.copy_((0.3 if parameter.dim() > 1 else 0.1) * noise)
        model.embed.weight.mul_(3)
    return model


def make(
    num_tokens: int,
    loss_windows: Sequence[int],
    num_sequences: int = 2,
    window: int = WINDOW,
    seed: int = 5,
    valid: Tensor | None = None,
    reset_state: Tensor | None = None,
) -> Batch:
    """Random tokens; every real token of the ``loss_windows`` is a target."""
    draw = torch.Generator().manual_seed(seed)
    ids, targets = torch.randint(VOCAB, (2, num_sequences, num_tokens), generator=draw)
    of_window = torch.arange(num_tokens) // window
    mask = torch.isin(of_window, torch.tensor(list(loss_windows), dtype=torch.long))
    mask = mask.expand(num_sequences, -1) & (True if valid is None else valid)
    plan = tuple(w in loss_windows for w in range(-(-num_tokens // window)))
    difficulty = torch.zeros(num_sequences, dtype=torch.long)
    return Batch(ids, targets, mask, valid, reset_state, difficulty, plan, int(mask.sum()))


def spans(batch: Batch, window: int = WINDOW) -> Spans:
    length = batch.ids.shape[1]
    return [
        (w * window, min((w + 1) * window, length), loss) for w, loss in enumerate(batch.windows_with_loss)
    ]


def gradients(loss: Tensor, model: SleepModel) -> dict[str, Tensor]:
    """Of every parameter by name, zero where there is none."""
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), grads)}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """Within ``tolerance`` of the largest gradient, all names."""
    assert actual.keys() == expected.keys()
    scale = max(g.norm() for g in expected.values())
    errors = {n: float((actual[n] - g).norm() / scale) for n, g in expected.items()}
    wrong = {n: e for n, e in errors.items() if not e <= tolerance}
    assert not wrong, f"{len(wrong)} gradients differ, as {dict(sorted(wrong.items())[:3])}"


def assert_model_is_plain(model: SleepModel, batch: Batch, num_passes: int) -> None:
    """Losses per token and all gradients."""
    output = model(batch, num_passes)
    expected = plain_nll(model, batch.ids, batch.targets, spans(batch), num_passes)
    torch.testing.assert_close(output.nll, expected.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(output.loss_sum, expected.sum())
    assert_same(gradients(output.loss_sum, model), gradients(expected.sum(), model))


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    half = x.shape[-1] // 2
    angle = positions[:, None, None] * theta ** -(torch.arange(half, dtype=x.dtype) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1)


Cache = tuple[Tensor, Tensor, Tensor]


def attend(mixer: Any, x: Tensor, positions: Tensor, past: Cache | None, band: int) -> tuple[Tensor, Cache]:
    q, k, v = (p(x).unflatten(-1, (-1, mixer.head_dim)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    at = positions
    if past is not None:
        k, v, at = (torch.cat([old, new], dim=d) for old, new, d in zip(past, (k, v, at), (1, 1, 0)))
    group = q.shape[2] // k.shape[2]
    keys = rotate(k, at, mixer.theta).repeat_interleave(group, dim=2)
    scores = torch.einsum("bthd,bshd->bhts", rotate(q, positions, mixer.theta), keys) * mixer.head_dim**-0.5
    distance = positions[:, None] - at
    scores = scores.masked_fill((distance < 0) | (distance >= band), -torch.inf)
    out = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v.repeat_interleave(group, dim=2))
    return mixer.o_proj(out.flatten(2)), (k, v, at)


def fast_weight(mixer: Any, x: Tensor, S: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, taps = mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x), mixer.conv_width
    inputs = v if hasattr(mixer, "kernel_in") else torch.cat([k, v, q], dim=-1)
    if tail is None:
        tail = x.new_zeros(len(x), taps - 1, inputs.shape[-1])
    padded = torch.cat([tail, inputs], dim=1)
    if hasattr(mixer, "kernel_in"):
        kernels = mixer.kernel_out(F.silu(mixer.kernel_in(x))).unflatten(-1, (v.shape[-1], taps))
        v = (padded.unfold(1, taps, 1) * kernels).sum(-1)
    else:
        kernels = torch.cat([mixer.k_conv, mixer.v_conv, mixer.q_conv])
        mixed = F.conv1d(padded.mT, kernels[:, None], groups=len(kernels)).mT
        k, v, q = mixed.split([k.shape[-1], v.shape[-1], q.shape[-1]], dim=-1)
    q, k = (F.silu(y).unflatten(-1, (-1, mixer.key_dim)) for y in (q, k))
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    v = F.silu(v).unflatten(-1, (-1, mixer.value_dim))
    beta = torch.sigmoid(mixer.b_proj(x)) * (2 if mixer.negative_eigenvalues else 1)
    log_decay = torch.zeros_like(beta)
    if RULES[mixer.rule].decays:
        log_decay = -mixer.A_log.exp() * F.softplus(mixer.a_proj(x) + mixer.dt_bias)
    out, S = recurrent(q * mixer.key_dim**-0.5, k, v, log_decay, beta, S, mixer.rule)
    norm = mixer.o_norm
    out = F.rms_norm(out, norm.weight.shape, norm.weight, norm.eps) * F.silu(mixer.g_proj(x)).view_as(out)
    return mixer.o_proj(out.flatten(2)), S, padded[:, len(padded[0]) - taps + 1 :]


@dataclass
class Remembered:
    """What one block holds: its fast weights, tail, and the caches of the passes of the window before."""

    memory: Tensor
    tail: Tensor | None = None
    caches: Sequence[Cache] = ()


def initial(model: SleepModel, num_sequences: int) -> list[Remembered]:
    return [
        Remembered(torch.zeros(0) if s.memory is None else s.memory)
        for s in model.initial_state(num_sequences)
    ]


def trips_of(model: SleepModel, has_loss: bool, num_passes: int) -> list[tuple[int, range]]:
    count, config = len(model.stack.blocks), model.config
    top = count - config.coda_blocks
    prelude, core, coda = range(config.prelude_blocks), range(config.prelude_blocks, top), range(top, count)
    later = [(n, core) for n in range(2, num_passes + 1)]
    if model.sleep.schedule == "predict_then_consolidate":
        return [(1, prelude), (1, core), (1, coda), *later]
    if has_loss:
        return [(1, prelude), (1, core), (1, coda)]
    return [(1, prelude), (1, core), *later, (num_passes, coda)]


def plain_nll(
    model: SleepModel,
    ids: Tensor,
    targets: Tensor,
    windows: Spans,
    num_passes: int,
    expected: list[Tensor] | None = None,
) -> Tensor:
    """Loss of every token ``[B, T]``, zero in windows without loss; ``expected`` collects the mean number of
    passes ``[B]`` over each window that is slept on, where halting is learned."""
    remembered, parts = initial(model, len(ids)), []
    for start, stop, has_loss in windows:
        h, nll = model.embed(ids[:, start:stop]), None
        positions = torch.arange(start, stop)
        now = [Remembered(b.memory, None, []) for b in remembered]
        trips = trips_of(model, has_loss, num_passes)
        cut = trips[-1][0] - (model.sleep.backprop_passes or num_passes)
        reached, made = 1, []
        core_trips = [n for n, blocks in trips if blocks == core_of(model)]
        for n, blocks in trips:
            if n > reached and blocks.start == model.config.prelude_blocks and len(blocks):
                reached = n
                h = model.final_norm(h) if model.sleep.norm_between_passes else h
                if n == cut + 1:
                    h = h.detach()
                    cut_gradient(remembered, now)
            left = h
            for i in blocks:
                left = run_block(model, i, left, positions, n, has_loss and n == 1, remembered[i], now[i])
            if blocks.stop <= len(model.stack.blocks) - model.config.coda_blocks:
                h = left
            if blocks == core_of(model) and model.sleep.halting == "learned" and len(core_trips) > 1:
                made.append((h, [now[i].memory for i in blocks]))
                if n == core_trips[-1]:
                    h, memories, mean = mixture(model, made)
                    for i, memory in zip(blocks, memories):
                        now[i].memory = memory
                    if expected is not None:
                        expected.append(mean)
            if n == 1 and has_loss:
                nll = model.head(model.final_norm(left)).log_softmax(-1)
                nll = -nll.gather(2, targets[:, start:stop, None]).squeeze(2)
        parts.append(torch.zeros(ids[:, start:stop].shape, dtype=h.dtype) if nll is None else nll)
        for block in now:
            survive(model.sleep, block)
        remembered = now
    return torch.cat(parts, dim=1)


def core_of(model: SleepModel) -> range:
    return range(model.config.prelude_blocks, len(model.stack.blocks) - model.config.coda_blocks)


def mixture(
    model: SleepModel, made: list[tuple[Tensor, list[Tensor]]]
) -> tuple[Tensor, list[Tensor], Tensor]:
    """By the chance of each pass to be the last: of h, of the fast weights, and the mean number of passes."""
    head, goes_on, chances = model.halting_head, torch.ones(len(made[0][0]), dtype=made[0][0].dtype), []
    for h, _ in made[:-1]:
        mean = (h / (h.square().mean(-1, keepdim=True) + model.config.norm_eps).sqrt()).mean(1)
        halts = torch.sigmoid(mean @ head.weight + head.bias)
        chances.append(goes_on * halts)
        goes_on = goes_on * (1 - halts)
    chances.append(goes_on)
    h = sum(p[:, None, None] * h for p, (h, _) in zip(chances, made))
    memories = [
        sum(p.view(-1, 1, 1, 1) * s for p, s in zip(chances, of_block))
        if of_block[0].dim() == 4
        else of_block[0]
        for of_block in zip(*(memories for _, memories in made))
    ]
    return h, memories, sum((n + 1) * p for n, p in enumerate(chances))


def run_block(
    model: SleepModel,
    index: int,
    h: Tensor,
    positions: Tensor,
    pass_number: int,
    awake: bool,
    before: Remembered,
    now: Remembered,
) -> Tensor:
    block, spec = model.stack.blocks[index], model.config.blocks[index]
    x = block.mixer_norm(h)
    if spec.is_fast_weight:
        tail = before.tail if now.tail is None else None  # the first pass of this block over the window
        mixed, now.memory, now.tail = fast_weight(block.mixer, x, now.memory, tail)
    else:
        past = None
        if before.caches:
            past = before.caches[-1 if awake else min(pass_number, len(before.caches)) - 1]
        band = spec.width_tokens or model.sleep.window_tokens
        mixed, cache = attend(block.mixer, x, positions, past, band)
        now.caches = [*now.caches, cache]
    h = h + mixed
    x = block.mlp_norm(h)
    mlp = block.mlp
    return h + mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))


def cut_gradient(start: list[Remembered], now: list[Remembered]) -> None:
    """No gradient to the passes before, but the fast weights' start keeps its direct path."""
    for before, block in zip(start, now):
        block.memory = before.memory + (block.memory - before.memory).detach()
        block.tail = None if block.tail is None else block.tail.detach()
        block.caches = [tuple(x.detach() for x in cache) for cache in block.caches]


def survive(sleep: SleepConfig, block: Remembered) -> None:
    carried = sleep.convolution == "carried" or (sleep.convolution == "auto" and sleep.eviction == "sliding")
    block.tail = block.tail if carried else None
    block.memory = block.memory.detach() if sleep.detach_state else block.memory
    if sleep.eviction == "hard":
        block.caches = []
    elif sleep.sliding_kv == "last_pass":
        block.caches = block.caches[-1:]
