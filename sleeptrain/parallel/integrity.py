"""Silent corruption: replicas that no longer hold the same bits, and bits that nobody wrote.

What lies in memory between two updates must not change. So each process compares sums of the bits of its
weights and moments right before an update with those right after the one before: that tells who is wrong,
also among two, and before the next update covers it up. What an update itself went wrong in, the comparison
of the replicas' copies shows. All that stays on the device until a check, which gathers it once.
"""

from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor

from sleeptrain.parallel.topology import Topology
from sleeptrain.parallel.update import ShardedUpdate

NAMES_SHOWN = 3
INTEGER = {2: torch.int16, 4: torch.int32}  # by bytes of an element


class Integrity:
    """Of the weights and moments of a process with other replicas; all processes call the same methods."""

    def __init__(self, update: ShardedUpdate, topology: Topology) -> None:
        self.update, self.topology = update, topology
        self.look()

    def look(self) -> None:
        """Finds the tensors, which takes longer than to sum them up, and remembers what is in them."""
        copies, own = self._tensors()
        self.copied = [name for name, _ in copies]
        self.names = self.copied + [name for name, _ in own]
        self.bits = [_bits(x) for _, x in copies + own]
        self.changed = torch.zeros(len(self.names), dtype=torch.bool, device=self.topology.device)
        self.after_update()

    def before_update(self) -> None:
        """Marks what is not as the last update left it; no wait for the device."""
        self.changed |= self._sums() != self.left

    def after_update(self) -> None:
        """Remembers what the update left."""
        self.left = self._sums()

    def check(self) -> str | None:
        """Which process has wrong bits in which weight since the last check, the same answer in all; None
        where all is well."""
        self.before_update()
        changed = self._changed()
        self.look()
        apart = self._apart(self.left[: len(self.copied)])
        if not self.topology.any(bool(changed or apart)):
            return None
        told = self.topology.gathered((changed, apart))
        # That copies differ follows, where one of them was changed.
        found = [c for c, _ in told if c] or [a for _, a in told if a]
        return "; ".join(dict.fromkeys(found))

    def _changed(self) -> str | None:
        names = [name for name, is_changed in zip(self.names, self.changed.tolist()) if is_changed]
        if not names:
            return None
        return f"rank {self.topology.rank} holds other bits of {_listed(names)} than its last update left"

    def _apart(self, sums: Tensor) -> str | None:
        """Who differs from most of the replicas in what all of them hold; without a majority, all."""
        data = self.topology.data
        gathered = [torch.empty_like(sums) for _ in range(data.size())]
        dist.all_gather(gathered, sums, group=data)
        outsiders, names = set(), []
        for name, *values in zip(self.copied, *(x.tolist() for x in gathered)):
            (most, count), *others = Counter(values).most_common()
            if others:
                names.append(name)
                has_majority = 2 * count > len(values)
                outsiders |= {i for i, x in enumerate(values) if x != most or not has_majority}
        if not names:
            return None
        ranks = sorted(dist.get_global_rank(data, i) for i in outsiders)
        if len(ranks) == 1:
            return f"rank {ranks[0]} holds other bits of {_listed(names)} than the other replicas"
        return f"ranks {_words(ranks)} hold different bits of {_listed(names)}"

    def _sums(self) -> Tensor:
        sums = [_sum(x) for x in self.bits]
        return torch.stack(sums) if sums else self.changed.int()

    def _tensors(self) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
        """What every replica holds, and what this one holds alone; of what is on the device: looking through
        host memory would take as long as the update."""
        shards, update = self.update.shards, self.update
        copies = [(h.name, h.parameter.data) for h in shards.copies]
        own = [] if update.is_replicated else [(f.held.name, f.weight) for f in shards.fragments]
        moments = [
            (f"{f.held.name}/{key}", x)
            for i, f in enumerate(shards.fragments)
            for key, x in update.moments(i).items()
        ]
        (copies if update.is_replicated else own).extend(moments)
        return copies, [(name, x) for name, x in own if x.device == self.topology.device]


def _bits(x: Tensor) -> Tensor:
    """A view of a tensor's elements as integers."""
    return x.detach().view(-1).view(INTEGER[x.element_size()])


def _sum(bits: Tensor) -> Tensor:
    """Modulo 2^16 or 2^32: one flipped bit always changes it."""
    return bits.sum(dtype=bits.dtype).int()


def _listed(names: list[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more tensors" if more > 0 else "")


def _words(ranks: list[int]) -> str:
    return f"{', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
