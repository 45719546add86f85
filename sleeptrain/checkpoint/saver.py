"""Saving in the background: the caller waits for a copy to host memory, a thread of each process does the
rest.

The processes of a run share a file system, and their threads talk through the temporary folder of the save
alone, since a collective in a thread could meet one of the training. Every thread writes its files there and
then a small ``written_<n>.json``; that of process 0 waits for all of them, writes the manifest and renames
the folder to its final name. A process that fails renames the folder, too, and the others find it gone: that
works on a full disk, and no file of a failed save can get into a later one.
"""

import json
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

from sleeptrain.checkpoint import manifest, store
from sleeptrain.checkpoint.bucket import Bucket
from sleeptrain.checkpoint.durable import replace_file, sync_folder, write_new
from sleeptrain.checkpoint.manifest import CheckpointError, Contents
from sleeptrain.checkpoint.reader import DOCUMENT
from sleeptrain.checkpoint.slices import Slice
from sleeptrain.checkpoint.writer import HostMemory, StagedGroup, write_groups
from sleeptrain.schema import reason_of

WRITTEN, REASON = "written_{:05d}.json", "reason_{:05d}.txt"
GIVEN_UP = "another process gave it up"
PATIENCE_SECONDS, FAREWELL_SECONDS = 1800.0, 3.0


class Saver:
    """What one of ``world_size`` processes saves with; all of them call the same methods in the same order.

    ``barrier`` returns once every process has called it. Kept are the newest ``keep_last`` checkpoints (at
    least 1) and the multiples of ``keep_every_steps`` (0: none). A save that not all have written within
    ``patience_seconds`` has failed. Process 0 copies what is committed to the ``bucket``.
    """

    def __init__(
        self,
        checkpoints_dir: Path,
        keep_last: int,
        keep_every_steps: int,
        rank: int = 0,
        world_size: int = 1,
        barrier: Callable[[], None] = lambda: None,
        patience_seconds: float = PATIENCE_SECONDS,
        bucket: Bucket | None = None,
    ) -> None:
        self.checkpoints_dir, self.keep_last, self.keep_every_steps = (
            checkpoints_dir,
            keep_last,
            keep_every_steps,
        )
        self.rank, self.world_size, self.barrier = rank, world_size, barrier
        self.patience_seconds, self.bucket = patience_seconds, bucket
        self.committed_step = 0  # the newest that is known to be on the disk
        self._memory = HostMemory()
        self._thread: Thread | None = None
        self._failure: CheckpointError | None = None

    def save(self, step: int, groups: dict[str, list[Slice]], documents: dict[str, dict[str, Any]]) -> None:
        """Begins a checkpoint of ``step``, after waiting for the one before; slices may change on return.

        Every process gives the slices that it alone holds. A group becomes files such as
        ``model_00000.safetensors`` (bits are kept), and ``documents["trainer"]`` of process 0 becomes
        ``trainer.json`` (string keys; floats are kept exactly). A checkpoint of the same step is replaced.
        ``wait`` and ``result`` tell how it ended.
        """
        texts = {name: json.dumps(document, indent=2).encode() for name, document in documents.items()}
        if self._thread:
            self._thread.join()
        folder, problem = self._begin(step)
        if folder is None:
            self._failure = CheckpointError(self._sentence(step, problem))
            return
        staged = self._memory.copy(groups)
        self._thread = Thread(target=self._finish, args=(step, folder, staged, texts), daemon=True)
        self._thread.start()

    def prepare(self, groups: dict[str, list[Slice]]) -> None:
        """Before the first save of such slices, so that it need not wait for the memory; returns at once."""
        self._memory.prepare(groups)

    def result(self) -> CheckpointError | None:
        """How a save failed that is over, told once; None where none did or it still runs. Does not block."""
        return self.wait(at_most_seconds=0)

    def wait(self, at_most_seconds: float | None = None) -> CheckpointError | None:
        """The same after the running save is over, or after ``at_most_seconds``."""
        if self._thread:
            self._thread.join(at_most_seconds)
            if self._thread.is_alive():
                return None
            self._thread = None
        failure, self._failure = self._failure, None
        return failure

    def close(self) -> CheckpointError | None:
        """``wait`` before leaving on an error: not for long where other processes may have died of it."""
        return self.wait(at_most_seconds=None if self.world_size == 1 else FAREWELL_SECONDS)

    def _begin(self, step: int) -> tuple[Path | None, Exception]:
        """The temporary folder of the new save, or why there is none."""
        problem: Exception = CheckpointError("process 0 could not begin it")
        folder = None
        try:
            folder = store.begin(self.checkpoints_dir, step) if self.rank == 0 else None
        except OSError as error:
            problem = error
        self.barrier()
        if self.rank > 0:
            folder = store.begun(self.checkpoints_dir, step)
            if folder is None and store.is_given_up(self.checkpoints_dir, step):
                problem = CheckpointError(GIVEN_UP)
        return folder, problem

    def _finish(
        self, step: int, folder: Path, staged: dict[str, StagedGroup], texts: dict[str, bytes]
    ) -> None:
        """What the thread does. Earlier checkpoints are as they were if it fails before the commit."""
        try:
            if self.rank == 0:
                self._write_and_commit(step, folder, staged, texts)
                store.settle(self.checkpoints_dir)
                store.retain(self.checkpoints_dir, step, self.keep_last, self.keep_every_steps)
                self._copy_to_bucket(step)
            else:
                self._write_and_wait(step, folder, staged)
                self.committed_step = step
        except Exception as error:  # of any kind: training goes on, and the other processes must hear of it
            given_up = isinstance(error, FileNotFoundError) and not folder.exists()
            sentence = self._sentence(step, CheckpointError(GIVEN_UP) if given_up else error)
            with suppress(OSError):
                sentence = self._give_up(folder, sentence)
            self._failure = CheckpointError(sentence)

    def _copy_to_bucket(self, step: int) -> None:
        """The checkpoint itself is committed, whatever becomes of its copy."""
        if self.bucket:
            try:
                self.bucket.put(self.checkpoints_dir / manifest.step_name(step))
                self.bucket.retain(step, self.keep_last, self.keep_every_steps)
            except CheckpointError as error:
                self._failure = CheckpointError(f"{manifest.step_name(step)} is on this disk alone: {error}")

    def _write_and_commit(
        self, step: int, folder: Path, staged: dict[str, StagedGroup], texts: dict[str, bytes]
    ) -> None:
        sync_folder(self.checkpoints_dir.parent)  # the name of the folder of checkpoints must last, too
        store.settle(self.checkpoints_dir)  # makes room first
        for name, text in texts.items():
            write_new(folder / f"{name}{DOCUMENT}", text)
        self._write(folder, staged)
        documents = {f"{name}{DOCUMENT}": manifest.document_entry(text) for name, text in texts.items()}
        contents = manifest.merged([Contents(documents, {}), *self._collect(folder)])
        manifest.write(folder, step, contents)
        sync_folder(folder)
        store.commit(folder, self.checkpoints_dir / manifest.step_name(step))
        self.committed_step = step  # from here on the other processes may say so, too
        sync_folder(self.checkpoints_dir)

    def _write_and_wait(self, step: int, folder: Path, staged: dict[str, StagedGroup]) -> None:
        """Returns when process 0 has committed."""
        identity = folder.stat().st_ino
        self._write(folder, staged)
        if not _wait_until(lambda: not folder.exists(), 2 * self.patience_seconds):
            raise CheckpointError("process 0 did not commit it in time")
        target = self.checkpoints_dir / manifest.step_name(step)
        if not target.exists() or target.stat().st_ino != identity:
            raise CheckpointError(GIVEN_UP)

    def _write(self, folder: Path, staged: dict[str, StagedGroup]) -> None:
        """This process' files, and then the news of them, which appears whole or not at all."""
        contents = write_groups(folder, self.rank, staged)
        news = folder / WRITTEN.format(self.rank)
        unfinished = news.with_name(f".{news.name}")
        unfinished.write_bytes(manifest.seal(manifest.to_json(contents)))
        unfinished.rename(news)

    def _collect(self, folder: Path) -> list[Contents]:
        """What every process has written; takes the news of it away."""
        names = [WRITTEN.format(rank) for rank in range(self.world_size)]
        missing = set(names)

        def all_written() -> bool:
            missing.difference_update(path.name for path in folder.iterdir())
            return not missing

        if not _wait_until(all_written, self.patience_seconds):
            raise CheckpointError(f"{', '.join(sorted(missing))} did not come in time")
        found = []
        for name in names:
            body = manifest.unseal((folder / name).read_bytes(), name)
            found.append(manifest.from_json(body))
            (folder / name).unlink()
        return found

    def _give_up(self, folder: Path, sentence: str) -> str:
        """Takes the temporary folder away from all; returns the sentence of the first that did so."""
        reason = REASON.format(self.rank)
        with suppress(OSError):  # another process may have taken the folder away
            for path in folder.glob(f"*_{self.rank:05d}.*"):  # makes room for the reason on a full disk
                path.unlink()
            replace_file(folder / reason, sentence.encode())
        failed = store.give_up(folder)
        reasons = {path.name: path for path in failed.glob(REASON.format(0).replace("00000", "?????"))}
        if self.rank == 0:
            store.restore(self.checkpoints_dir)
            if self.world_size == 1:
                shutil.rmtree(failed, ignore_errors=True)
            for path in set(failed.glob("*")) - set(reasons.values()):  # the others may still read these
                path.unlink(missing_ok=True)
        if reasons and reason not in reasons:
            return reasons[min(reasons)].read_text()
        return sentence

    def _sentence(self, step: int, error: Exception) -> str:
        where = f" in process {self.rank}" if self.world_size > 1 else ""
        remedy = "; free some space, or lower checkpoint.keep_last" if isinstance(error, OSError) else ""
        return (
            f"saving {manifest.step_name(step)} in {self.checkpoints_dir} failed{where} "
            f"({reason_of(error)}); the earlier checkpoints are intact{remedy}"
        )


def _wait_until(condition: Callable[[], bool], at_most_seconds: float) -> bool:
    """Whether it became true in time."""
    deadline, pause_seconds = time.monotonic() + at_most_seconds, 0.001
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause_seconds)
        pause_seconds = min(1.5 * pause_seconds, 0.1)
    return True
