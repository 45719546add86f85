"""The optimizer step over shards: global norm, clipping, Muon on whole matrices, AdamW.

It depends neither on the data- nor on the tensor-parallel degree: the norm counts every element of the
model once, and Muon orthogonalises each matrix whole, gathered from its fragments.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from sleeptrain.checkpoint.initial import InitialWeights
from sleeptrain.checkpoint.reader import Checkpoint
from sleeptrain.checkpoint.slices import Slice, whole
from sleeptrain.config import OptimConfig
from sleeptrain.optim.muon import matrices_at_once, orthogonalise, update_scale
from sleeptrain.optim.optimizer import ADAMW_STATE, is_muon
from sleeptrain.optim.patterns import fits
from sleeptrain.parallel.backend import UpdateResult
from sleeptrain.parallel.stage import Held, part_of
from sleeptrain.parallel.topology import Topology
from sleeptrain.parallel.zero import Fragment, Replicated, Shards


class ShardedUpdate:
    """MuonAdamW over the fragments of all replicas; holds Muon's momentum of those here.

    Of frozen weights the gradients are set to zero, and no moments are kept or saved.
    """

    def __init__(self, shards: Shards, held: list[Held], config: OptimConfig, topology: Topology) -> None:
        self.shards, self.config, self.topology = shards, config, topology
        self.is_replicated = isinstance(shards, Replicated)
        self.num_updates = 0
        counted = [float(self.is_counted(f.held)) for f in shards.fragments]
        self.counted = torch.tensor(counted, dtype=torch.float64, device=topology.device)
        trained = [h for h in held if not fits(h.name, config.frozen)]
        self.groups = _by_shape([h for h in trained if is_muon(h.name, h.shape)])
        self.frozen, self.momenta = set[int](), dict[int, Tensor]()
        for i, f in enumerate(shards.fragments):
            if fits(f.held.name, config.frozen):
                self.frozen.add(i)
            elif is_muon(f.held.name, f.held.shape):
                self.momenta[i] = torch.zeros_like(f.weight)

    def step(self, lr_factor: float, loss_part: Tensor, max_norm: float = math.inf) -> UpdateResult:
        """Clips and updates; leaves weights and moments as they are when loss or norm is not finite, or the
        norm above ``max_norm``, which is the same in all processes.

        ``loss_part`` is this process's part of the loss: over all processes they add up to it.
        """
        gradients = self.shards.gradients()
        for i in self.frozen:
            gradients[i].zero_()
        told = torch.stack([loss_part.double().reshape(()), self._squared_norm(gradients)])
        dist.all_reduce(told)
        loss, squared_norm = told.tolist()  # the one wait for the device in a step
        grad_norm = math.sqrt(squared_norm) if squared_norm >= 0 else math.nan
        applied = math.isfinite(loss) and math.isfinite(grad_norm) and grad_norm <= max_norm
        if not applied:
            self.shards.discard()
            return UpdateResult(loss, grad_norm, applied)
        if self.config.clip_norm:
            factor = self.config.clip_norm / (grad_norm + 1e-6)
            if factor < 1:
                torch._foreach_mul_(gradients, factor)
        self._orthogonalise(gradients)
        self.shards.step(lr_factor)
        self.num_updates += 1
        return UpdateResult(loss, grad_norm, applied)

    def slices(self) -> dict[str, list[Slice]]:
        """Weights and moments that this process speaks for: over all processes each element once."""
        fragments = list(enumerate(self.shards.fragments))
        counted = [(i, f) for i, f in fragments if self.is_counted(f.held)]
        groups = {"model": [_slice(f, "", f.weight) for _, f in counted], "optimizer": []}
        for i, f in counted if self.num_updates else []:
            groups["optimizer"] += [_slice(f, f"/{key}", x) for key, x in self.moments(i).items()]
        if self.topology.rank == 0:
            groups["optimizer"].append(whole("num_updates", torch.tensor(self.num_updates)))
        return groups

    def load(self, checkpoint: Checkpoint) -> None:
        """Takes over what any topology saved; KeyError where a tensor is missing, ValueError where the
        shape of one is another."""
        self.num_updates = int(checkpoint.read("optimizer", "num_updates"))
        for i, f in enumerate(self.shards.fragments):
            if checkpoint.shape("model", f.held.name) != tuple(f.held.shape):
                raise ValueError(f"{f.held.name} has another shape there")
            _read(checkpoint, "model", f, "", f.weight)
            for key, x in self.moments(i).items() if self.num_updates else ():
                _read(checkpoint, "optimizer", f, f"/{key}", x)
        self.shards.refresh(self.num_updates)

    def start_from(self, weights: InitialWeights) -> None:
        """Takes over weights alone, as far as they are held there; new blocks add nothing."""
        for f in self.shards.fragments:
            if weights.holds(f.held.name):
                f.weight.copy_(weights.read(f.held.name, f.held.box, f.start, f.start + len(f.weight)))
            elif weights.is_zero(f.held.name):
                f.weight.zero_()
        self.shards.refresh(0)

    def moments(self, fragment: int) -> dict[str, Tensor]:
        """Views of a fragment's; none where it is frozen."""
        if fragment in self.frozen:
            return {}
        if fragment in self.momenta:
            return {"momentum": self.momenta[fragment]}
        return {key: self.shards.moment(fragment, key) for key in ADAMW_STATE}

    def _squared_norm(self, gradients: list[Tensor]) -> Tensor:
        """Of what is counted here; NaN also where another copy is not finite: no process may update with
        it."""
        if not gradients:
            return torch.zeros_like(self.counted).sum()
        norms = torch.stack(torch._foreach_norm(gradients)).to(self.counted)
        return (norms.square() * self.counted).sum()  # inf * 0 is NaN

    def is_counted(self, held: Held) -> bool:
        """Whether this process is the one that speaks for what it holds of a weight."""
        one_of_tensor = held.split.dim is not None or self.topology.tensor.rank() == 0
        one_of_data = not self.is_replicated or self.topology.data.rank() == 0
        return held.is_counted and one_of_tensor and one_of_data

    def _orthogonalise(self, gradients: list[Tensor]) -> None:
        """Replaces the gradients of Muon's weights by its updates."""
        momentum, fragments = self.config.muon_momentum, self.shards.fragments
        own, momenta = [gradients[i] for i in self.momenta], list(self.momenta.values())
        if own:
            torch._foreach_lerp_(momenta, own, 1 - momentum)
            torch._foreach_lerp_(own, momenta, momentum)  # Nesterov
        owned = {fragments[i].held.name: (fragments[i].start, gradients[i]) for i in self.momenta}
        for group in self.groups:
            matrices = self._gathered(group, owned)
            updates = orthogonalise(matrices, self.config.muon_steps, self.config.muon_precision)
            updates *= update_scale(group[0].shape, self.config.muon_scale)
            for held, update in zip(group, updates):
                if held.name in owned:
                    start, gradient = owned[held.name]
                    flat = part_of(update, held.box).reshape(-1)
                    gradient.copy_(flat[start : start + len(gradient)])

    def _gathered(self, group: list[Held], owned: dict[str, tuple[int, Tensor]]) -> Tensor:
        """Whole matrices ``[k, out, in]`` of one shape: from the replicas' fragments, and from the tensor
        ranks."""
        first, data, tensor = group[0], self.topology.data, self.topology.tensor
        local = tuple(stop - start for start, stop in first.box)
        parts = torch.zeros(len(group), math.prod(local), device=self.topology.device)
        for held, part in zip(group, parts):
            if held.name in owned:
                start, values = owned[held.name]
                part[start : start + len(values)] = values
        if data.size() > 1 and not self.is_replicated:
            dist.all_reduce(parts, group=data)
        parts = parts.view(len(group), *local)
        if tensor.size() == 1 or first.split.dim is None:
            return parts
        of_ranks = [torch.empty_like(parts) for _ in range(tensor.size())]
        dist.all_gather(of_ranks, parts, group=tensor)
        return torch.cat(of_ranks, dim=first.split.dim + 1)


def _by_shape(held: list[Held]) -> list[list[Held]]:
    """Matrices that can be orthogonalised as one batch, as many as are whole in memory at once."""
    groups: dict[tuple, list[Held]] = {}
    for h in held:
        groups.setdefault((h.shape, h.box, h.split), []).append(h)
    return [
        group[i : i + matrices_at_once(group[0].shape)]
        for group in groups.values()
        for i in range(0, len(group), matrices_at_once(group[0].shape))
    ]


def _slice(fragment: Fragment, suffix: str, values: Tensor) -> Slice:
    held = fragment.held
    return Slice(held.name + suffix, tuple(held.shape), held.box, fragment.start, values)


def _read(checkpoint: Checkpoint, group: str, fragment: Fragment, suffix: str, into: Tensor) -> None:
    held, stop = fragment.held, fragment.start + len(into)
    into.copy_(checkpoint.read(group, held.name + suffix, held.box, fragment.start, stop))
