"""Reading shards: samples per second of ours, of webdataset's, of tarfile's, and of the bytes alone.

The samples are examples of 2 kB, [2, 512] int16, in shards of 2000, in the page cache. Per round and in turn:
the bytes of the files alone; ours, which parses a shard as a whole and hands out key, .json and .npy of every
sample as bytes; the same with the SHA-256 of every shard compared first; the same with both decoded; ours as
a run reads, hashed and parsed in threads, one shard ahead; webdataset, which hands out the same bytes;
webdataset with .decode(); and Python's tarfile, every member read. But for the threads all is on one thread.
Ratios are rates: ours over the peer named. At the end stands what streaming costs a training step
(``streamed_step.py``).
"""

import tarfile
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import measure
import numpy as np
import streamed_step

from sleeptrain.data.fetch import ShardReader, read_verified
from sleeptrain.data.index import Index, ShardEntry
from sleeptrain.data.shards import Shard, write_shard

SAMPLE_TOKENS, VOCAB_SIZE = 512, 1000
SIDES = {
    "raw": "bytes alone",
    "plain": "ours, no hash",
    "hashed": "ours, hashed",
    "decoded": "ours, hashed and decoded",
    "ahead": "ours, hashed, one shard ahead",
    "wds": "webdataset",
    "wds_decoded": "webdataset .decode()",
    "tarfile": "tarfile",
}
BARS = [
    ("plain", "wds", 8.0),
    ("hashed", "wds", 4.0),
    ("plain", "raw", 0.15),
    ("decoded", "wds_decoded", None),
    ("plain", "tarfile", None),
]


class Sides:
    """A set of shards in a folder, and each way to read all of it."""

    def __init__(self, folder: Path, num_shards: int, shard_samples: int) -> None:
        rng = np.random.default_rng(0)
        shape = (num_shards, shard_samples, 2, SAMPLE_TOKENS)
        self.tokens = rng.integers(-1, VOCAB_SIZE, shape).astype(np.int16)
        self.folder, self.num_samples = folder, num_shards * shard_samples
        entries = tuple(self._write(number) for number in range(num_shards))
        self.index = Index("examples", "train", SAMPLE_TOKENS, VOCAB_SIZE, {}, "", "", entries)
        self.paths = [folder / entry.name for entry in entries]

    def _write(self, number: int) -> ShardEntry:
        samples = [({"difficulty": 4, "index": i}, array) for i, array in enumerate(self.tokens[number])]
        file = BytesIO()
        write_shard(file, samples, number * len(samples))
        data, name = file.getvalue(), f"bench-{number:06d}.tar"
        (self.folder / name).write_bytes(data)
        return ShardEntry(name, len(samples), self.tokens[number].size, len(data), sha256(data).hexdigest())

    def calls(self) -> dict[str, Callable[[], object]]:
        return {name: getattr(self, name) for name in SIDES}

    def raw(self) -> int:
        return sum(len(path.read_bytes()) for path in self.paths)

    def plain(self) -> int:
        return sum(hand_out(Shard(np.fromfile(path, np.uint8), path.name)) for path in self.paths)

    def hashed(self) -> int:
        return sum(map(hand_out, self.shards()))

    def decoded(self) -> int:
        return sum(bool(s.meta(i)) + len(s.tokens(i)) for s in self.shards() for i in range(len(s)))

    def ahead(self) -> int:
        return sum(hand_out(future.result()) for future in self.futures())

    def wds(self) -> int:
        return sum(len(sample["json"]) + len(sample["tokens.npy"]) for sample in self.dataset())

    def wds_decoded(self) -> int:
        return sum(bool(s["json"]) + len(s["tokens.npy"]) for s in self.dataset().decode())

    def tarfile(self) -> int:
        num_bytes = 0
        for path in self.paths:
            with tarfile.open(path) as tar:
                for member in tar:
                    num_bytes += len(tar.extractfile(member).read())  # type: ignore[union-attr]
        return num_bytes

    def shards(self) -> Iterator[Shard]:
        for path, entry in zip(self.paths, self.index.shards):
            yield Shard(read_verified(str(path), entry), entry.name)

    def futures(self) -> Iterator["Future[Shard]"]:
        reader = ShardReader(str(self.folder), self.index, cache=None)
        following = reader.fetch(0)
        for number in range(len(self.paths)):
            here, following = following, reader.fetch(min(number + 1, len(self.paths) - 1))
            yield here

    def dataset(self) -> Any:
        import webdataset

        return webdataset.WebDataset([str(path) for path in self.paths], shardshuffle=False)

    def check(self) -> None:
        """All sides find the same bytes, and both decoders the arrays that were written."""
        assert self.plain() == self.hashed() == self.ahead() == self.wds() == self.tarfile()
        assert self.decoded() == self.wds_decoded()
        ours = [shard.tokens(i) for shard in self.shards() for i in range(len(shard))]
        theirs = [sample["tokens.npy"] for sample in self.dataset().decode()]
        written = self.tokens.reshape(-1, 2, SAMPLE_TOKENS)
        assert np.array_equal(ours, written)
        assert np.array_equal(theirs, written)


def hand_out(shard: Shard) -> int:
    """Every sample as key and bytes; the bytes of all."""
    num_bytes = 0
    for sample, _ in enumerate(shard.keys):
        meta, tokens = shard.members(sample)
        num_bytes += len(meta) + len(tokens)
    return num_bytes


def main() -> None:
    options = measure.parser(__doc__ or "", rounds=15).parse_args()
    measure.require(["webdataset"])
    measure.begin(["numpy", "webdataset"])
    with tempfile.TemporaryDirectory() as name:
        sides = Sides(Path(name), 2 if options.quick else 5, 20 if options.quick else 2000)
        sides.check()
        times = measure.interleaved(sides.calls(), options.rounds)
    print(f"\n{sides.num_samples} samples; all sides find the same; samples/s over {options.rounds} rounds")
    rates = [
        (
            label,
            f"{sides.num_samples / measure.median_wall(times[side]):,.0f}",
            f"{sides.num_samples / measure.least_cpu(times[side]):,.0f}",
        )
        for side, label in SIDES.items()
    ]
    measure.show(("", "median", "by least cpu"), rates)
    for ours, peer, bar in BARS:
        ratio = measure.ratio(times[peer], times[ours])
        print(f"ratio {SIDES[ours]} / {SIDES[peer]}: {ratio}")
        if bar and not options.quick:
            measure.judge(f"{SIDES[ours]} / {SIDES[peer]}", ratio.wall, at_least=bar)
    streamed_step.report(options)


if __name__ == "__main__":
    main()
