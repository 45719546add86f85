"""Saving and loading checkpoints against what no checkpoint can do without, and against torch's own.

The state is that of a real model and its optimizer, about 200 MB. Per round and in turn: a plain copy of as
many bytes in memory; a save, timed until the training may go on (stall) and until it is committed (durable);
torch.distributed.checkpoint.async_save, timed the same; a plain write and fsync of as many bytes; torch.load;
our load of all tensors, every byte of it compared with its hash (verified); and the start of a run, which
verifies the newest checkpoint first, so that it can fall back, and then loads it. Files are in the page cache
when they are loaded. Ratios are ours over the peer named.
"""

import argparse
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import measure
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from sleeptrain.checkpoint.manifest import step_name
from sleeptrain.checkpoint.reader import Checkpoint
from sleeptrain.checkpoint.saver import Saver
from sleeptrain.checkpoint.store import find_latest
from sleeptrain.config import Config, ModelConfig, RunConfig
from sleeptrain.parallel.backend import LocalBackend

SIDES = {
    "copy": "memcpy",
    "stall": "our save: stall",
    "dcp_stall": "DCP async_save: stall",
    "raw": "write + fsync",
    "durable": "our save: durable",
    "dcp_durable": "DCP async_save: durable",
    "torch_load": "torch.load",
    "load": "our load, verified",
    "resume": "our find_latest, then load",
}
BARS = [
    ("stall", "copy", 1.3),
    ("stall", "dcp_stall", 0.5),
    ("durable", "raw", 1.4),
    ("load", "torch_load", 2.0),
    ("resume", "torch_load", None),
]


class Sides:
    """The state, and a round of all sides with it."""

    def __init__(self, folder: Path, backend: LocalBackend) -> None:
        self.folder, self.backend = folder, backend
        self.slices = backend.slices()
        flat = [s.values.view(torch.uint8) for group in self.slices.values() for s in group]
        self.source = torch.cat(flat)
        self.target = torch.empty_like(self.source)
        self.saver = Saver(folder / "ours", keep_last=1, keep_every_steps=0)
        self.tensors = {f"{group}/{s.name}": s.values for group, found in self.slices.items() for s in found}
        torch.save(self.tensors, folder / "torch.pt")
        self.step = 0

    def round(self) -> dict[str, measure.Seconds]:
        self.step += 1
        for left in ("ours", "dcp", "raw"):
            shutil.rmtree(self.folder / left, ignore_errors=True)
        times = {"copy": measure.timed(lambda: np.copyto(self.target.numpy(), self.source.numpy()))}
        times["stall"], times["durable"] = self.save()
        times["raw"] = measure.timed(self.write)
        times["dcp_stall"], times["dcp_durable"] = self.save_by_dcp()
        times["torch_load"] = measure.timed(lambda: torch.load(self.folder / "torch.pt"))
        times["load"] = measure.timed(lambda: read(Checkpoint(self.path)))
        times["resume"] = measure.timed(lambda: read(found(self.folder / "ours")))
        return times

    @property
    def path(self) -> Path:
        return self.folder / "ours" / step_name(self.step)

    def save(self) -> tuple[measure.Seconds, measure.Seconds]:
        start = measure.now()
        self.saver.save(self.step, self.backend.slices(), {"trainer": {"step": self.step}})
        stall = measure.since(start)
        failure = self.saver.wait()
        durable = measure.since(start)
        if failure:
            raise failure
        return stall, durable

    def save_by_dcp(self) -> tuple[measure.Seconds, measure.Seconds]:
        start = measure.now()
        future = dcp.async_save(self.tensors, checkpoint_id=self.folder / "dcp")
        stall = measure.since(start)
        future.result()
        return stall, measure.since(start)

    def write(self) -> None:
        (self.folder / "raw").mkdir()
        with (self.folder / "raw" / "bytes").open("wb", buffering=0) as file:
            part = self.source.numpy().data
            while len(part):
                part = part[file.write(part) :]
            os.fsync(file.fileno())

    def check(self) -> None:
        """What was loaded is what was saved."""
        loaded = read(Checkpoint(self.path))
        for group, slices in self.slices.items():
            for s in slices:
                assert torch.equal(loaded[group][s.name].view(-1), s.values), s.name


def main() -> None:
    options = arguments()
    measure.begin()
    warnings.filterwarnings("ignore", module="torch.distributed")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
        sides = Sides(folder, trained(options.quick))
        sides.round()
        rounds = [sides.round() for _ in range(options.rounds)]
        sides.check()
        dist.destroy_process_group()
    times = {name: [r[name] for r in rounds] for name in SIDES}
    size = f"{sides.source.numel() / 1e6:.0f} MB in {len(sides.tensors)} tensors"
    print(f"\n{size}; milliseconds over {options.rounds} rounds; what was loaded equals what was saved")
    rows = [
        (
            label,
            f"{1e3 * measure.median_wall(times[name]):.1f}",
            f"{1e3 * measure.least_cpu(times[name]):.1f}",
        )
        for name, label in SIDES.items()
    ]
    measure.show(("", "median", "least cpu"), rows)
    for ours, peer, bar in BARS:
        ratio = measure.ratio(times[ours], times[peer])
        print(f"ratio {SIDES[ours]} / {SIDES[peer]}: {ratio}")
        if bar and not options.quick:
            measure.judge(f"{SIDES[ours]} / {SIDES[peer]}", ratio.wall, at_most=bar)


def arguments() -> argparse.Namespace:
    parser = measure.parser(__doc__ or "", rounds=15)
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    return parser.parse_args()


def trained(quick: bool) -> LocalBackend:
    """A model after one update, so that its optimizer holds all moments."""
    model = ModelConfig(d_model=32 if quick else 576)
    backend = LocalBackend(
        Config(run=RunConfig(device="cpu"), model=model), vocab_size=128 if quick else 8192
    )
    for parameter in backend.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    backend.optimizer.step(1.0)
    backend.model.zero_grad()
    return backend


def read(checkpoint: Checkpoint) -> dict[str, dict[str, Tensor]]:
    return {group: checkpoint.read_all(group) for group in checkpoint.groups}


def found(checkpoints_dir: Path) -> Checkpoint:
    checkpoint = find_latest(checkpoints_dir, print)
    assert checkpoint
    return checkpoint


if __name__ == "__main__":
    main()
