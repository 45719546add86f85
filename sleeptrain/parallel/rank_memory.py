"""How many bytes a rank needs for its part of the model (``layout.py``), and what is alive at once.

Activations count in float32, as in ``model/flops.py``; under bfloat16 autocast they are 10 to 25 % smaller.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from sleeptrain.config import Config
from sleeptrain.model.flops import FLOAT32_BYTES, activation_bytes
from sleeptrain.model.sizes import tokens_at_once
from sleeptrain.model.visits import Visit, Window, loss_tokens, plan, segments_of
from sleeptrain.optim.muon import matrices_at_once
from sleeptrain.optim.optimizer import is_muon, takes_decay
from sleeptrain.parallel.layout import (
    Share,
    bucket_elements,
    degrees_alone,
    model_of_rank,
    shares_of_stage,
    visits_of_stage,
)
from sleeptrain.parallel.rows import micro_batch_of

GATHERED_ELEMENTS = 1_000_000_000  # what ZeRO 3 leaves gathered


class RankBytes(NamedTuple):
    """Device memory of one rank. ``weights``: what the model computes with; ``masters``: DeepSpeed's own copy
    of those that this replica updates. ``gradients`` are whole, whatever the ZeRO stage, because they add up
    over all visits before they are reduced once. Activations are gone when the update begins."""

    weights: int
    masters: int
    gradients: int
    optimizer: int
    activations: int
    messages: int
    update: int

    @property
    def total(self) -> int:
        fixed = self.weights + self.masters + self.gradients + self.optimizer + self.messages
        return fixed + max(self.activations, self.update)


def rank_bytes(
    config: Config, vocab_size: int, windows: Sequence[Window], replicas: int, stage: int
) -> RankBytes:
    """What the fullest moment of a step needs on a rank of this stage, in the first replica."""
    shares = shares_of_stage(config, vocab_size, stage)
    whole = sum(share.num_elements for share in shares)
    weights, masters, gradients, moments = fixed_bytes(config, shares, replicas)
    activations, messages = live_bytes(config, vocab_size, windows, replicas, stage)
    if _zero_stage(config, replicas) == 3:  # its bucket has its room from the start
        weights += FLOAT32_BYTES * min(whole, GATHERED_ELEMENTS)
        messages += FLOAT32_BYTES * bucket_elements(whole)
    if config.run.cuda_graphs:  # copies of the weights, and sums of their gradients (model/graphs.py)
        weights += whole * (FLOAT32_BYTES + (FLOAT32_BYTES if config.run.precision == "float32" else 2))
    update = _update_bytes(config, shares, replicas)
    return RankBytes(weights, masters, gradients, moments, activations, messages, update)


def fixed_bytes(config: Config, shares: Sequence[Share], replicas: int) -> tuple[int, int, int, int]:
    """Weights, masters, gradients, and moments: Muon's momentum, AdamW's two. DeepSpeed fills each replica's
    part of a group of weights up to an even number."""
    stage, whole = _zero_stage(config, replicas), sum(share.num_elements for share in shares)
    groups: dict[tuple[bool, bool], list[int]] = {}
    for share in shares:
        kind = (is_muon(share.name, share.shape), takes_decay(share.name))
        groups.setdefault(kind, []).append(share.num_elements)
    muon = sum(sum(sizes) for (by_muon, _), sizes in groups.items() if by_muon)
    if stage == 0:
        masters, weights, moments = 0, FLOAT32_BYTES * whole, 2 * whole - muon
    else:
        if stage == 3:
            parts = {kind: sum(-(-n // replicas) for n in sizes) for kind, sizes in groups.items()}
        else:
            parts = {kind: 2 * -(-sum(sizes) // (2 * replicas)) for kind, sizes in groups.items()}
        copies = 1 if stage == 3 else replicas
        weights = sum(copies * part * _weight_bytes(config, decays) for (_, decays), part in parts.items())
        moments = sum(min(muon, part) if by_muon else 2 * part for (by_muon, _), part in parts.items())
        masters = sum(parts.values())
    if config.parallel.offload_optimizer:
        masters = moments = 0
    return weights, FLOAT32_BYTES * masters, FLOAT32_BYTES * whole, FLOAT32_BYTES * moments


def _weight_bytes(config: Config, takes_decay: bool) -> int:
    """What takes no weight decay (norms, A_log, dt_bias, initial fast weights) stays in float32."""
    return 2 if takes_decay and config.parallel.weights == "bfloat16" else FLOAT32_BYTES


def _zero_stage(config: Config, replicas: int) -> int:
    """0 also for plain torch."""
    return 0 if config.parallel.is_local and replicas == 1 else config.parallel.zero_stage


def _update_bytes(config: Config, shares: Sequence[Share], replicas: int) -> int:
    """What reducing and updating needs for a while: a flat copy or a bucket of gradients, this replica's part
    of them; and Muon's matrices of one shape, whole, with the products of an iteration."""
    stage, whole = _zero_stage(config, replicas), sum(share.num_elements for share in shares)
    by_shape: dict[torch.Size, int] = {}
    for share in shares:
        if is_muon(share.name, share.shape):
            by_shape[share.shape] = by_shape.get(share.shape, 0) + 1
    batches = {s: min(n, matrices_at_once(s)) for s, n in by_shape.items()}
    muon = max((n * (5 * math.prod(s) + 3 * min(s) ** 2) for s, n in batches.items()), default=0)
    if stage == 0:
        return FLOAT32_BYTES * max(whole if replicas > 1 else 0, muon)
    part = whole // replicas
    return FLOAT32_BYTES * (part + max(bucket_elements(whole) if stage < 3 else 0, muon))


def live_bytes(
    config: Config, vocab_size: int, windows: Sequence[Window], replicas: int, stage: int
) -> tuple[int, int]:
    """Most bytes of activations, and of messages, that a stage holds at once.

    A pipeline holds the visits between their forward and backward passes, and of each what it sent on.
    """
    num_stages, rows = config.parallel.pipeline_size, config.data.batch_sequences // replicas
    micro = micro_batch_of(config, rows)
    visits = visit_bytes(config, vocab_size, windows, stage)
    num_micro = min(rows // micro, 3 * num_stages) if num_stages > 1 else 1  # more only repeat it
    activations = most_alive(visits, num_micro, num_stages, stage)
    if num_stages == 1:
        return micro * activations, 0
    message = FLOAT32_BYTES * max(w.stop - w.start for w in windows) * config.model.d_model
    sent = most_alive([(message, 0)] * len(visits), num_micro, num_stages, stage)
    return micro * activations, micro * (sent + 4 * message)  # 4 on the way: h and its gradient, in and out


def most_alive(visits: Sequence[tuple[int, int]], num_micro: int, num_stages: int, stage: int) -> int:
    """Most that is alive in megatron-core's interleaved schedule, each visit holding its first number from
    its forward pass to the end of its backward pass, and its second beside during the latter. On the first
    stage about (V - 1) p + 2 (p - 1) visits are in between."""
    groups = [range(i, min(i + num_stages, num_micro)) for i in range(0, num_micro, num_stages)]
    forward = [held for group in groups for held, _ in visits for _ in group]
    backward = [visit for group in groups for visit in reversed(visits) for _ in group]
    behind = num_stages - stage - 1
    warmup = behind if len(visits) == 1 else 2 * behind + (len(visits) - 1) * num_stages
    alive = most = sum(forward[:warmup])
    for i, (held, again) in enumerate(backward):
        alive += sum(forward[warmup + i : warmup + i + 1])
        most = max(most, alive + again)
        alive -= held
    return most


def visit_bytes(
    config: Config, vocab_size: int, windows: Sequence[Window], stage: int
) -> list[tuple[int, int]]:
    """Bytes of one sequence that each visit holds on a stage until its backward pass, and those that it needs
    beside in the latter: what is computed again, and the gradients of an MLP at work."""
    mode, part = config.sleep.activation_checkpointing, model_of_rank(config, stage)
    visits = plan(windows, config.sleep.num_passes, config.model, config.sleep)
    memory = FLOAT32_BYTES * part.memory_heads * part.memory_key_dim * part.memory_value_dim
    found = []
    for visit, body in zip(visits, _bodies(degrees_alone(config), tuple(windows), stage)):
        tokens = windows[visit.window].stop - windows[visit.window].start
        here = [part.blocks[i] for i in segments_of(part).get(visit.segment, ())]
        h, states = FLOAT32_BYTES * tokens * part.d_model, memory * sum(spec.is_fast_weight for spec in here)
        of_blocks, largest = len(here) * h + states, body // max(1, len(here))
        held, again = body, 0
        if body and mode in ("pass", "both") and not visit.is_kept:
            held, again = h + states, body if mode == "pass" else of_blocks + largest
        elif body and mode in ("block", "both"):
            held, again = of_blocks, largest
        again += FLOAT32_BYTES * tokens * (6 * part.d_model + 4 * part.mlp_hidden) if body else 0
        if visit.has_loss and stage == config.parallel.pipeline_size - 1:
            at_once = tokens_at_once(1, vocab_size)
            logits = FLOAT32_BYTES * min(tokens, at_once) * vocab_size // config.parallel.tensor_size
            head, beside = (3 * h + logits, 0) if loss_tokens(windows) <= at_once else (h, 3 * logits)
            held, again = held + head, max(beside, again - head)  # its own backward pass comes first
        found.append((held, again))
    return found


@lru_cache(maxsize=1024)
def _bodies(config: Config, windows: tuple[Window, ...], stage: int) -> list[int]:
    """Bytes of one sequence that the blocks of a stage save in each visit; 0 where no gradient comes by."""
    part, sizes, after = model_of_rank(config, stage), [], 0
    later: list[Visit] = []
    for visit in reversed(visits_of_stage(config, windows, stage)):
        later = later if visit is None else [visit._replace(has_loss=False), *later]
        total = activation_bytes(part, config.sleep, windows, later, 1, per_pass=False)
        sizes.append(total - after)
        after = total
    return sizes[::-1]
