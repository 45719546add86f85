"""Copies of checkpoints in a bucket, for runs whose disk may go away: any URL that fsspec opens.

    checkpoint.bucket/RUN_ID/step_00000200/   the files of the checkpoint; manifest.json is put last

A folder without its manifest is no checkpoint: objects cannot be renamed as folders can. What comes back is
verified like everything else, whoever may have written it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from sleeptrain.checkpoint import manifest, store
from sleeptrain.checkpoint.manifest import FILE, FILE_NAME, CheckpointError
from sleeptrain.checkpoint.reader import Checkpoint
from sleeptrain.schema import ConfigError, reason_of


class Bucket:
    """The copies of one run. What cannot be done raises CheckpointError; ConfigError for no such place."""

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs  # runs without a bucket start sooner

        self.url = url.rstrip("/")
        try:
            self._files, self._path = url_to_fs(self.url)
        except (ImportError, ValueError) as error:  # its package is missing, or there is no such protocol
            raise ConfigError(
                f"checkpoint.bucket={url} cannot be used ({error}); give a URL that fsspec opens, and "
                "install the package that it asks for"
            ) from error

    def steps(self) -> list[int]:
        """Of the checkpoints that are there whole, newest first."""
        with self._saying("listed"):
            names = [PurePosixPath(path).name for path in self._names(self._path)]
            found = [name for name in names if FILE in self._names(f"{self._path}/{name}")]
        steps = map(manifest.named_step, map(Path, found))
        return sorted({step for step in steps if step is not None}, reverse=True)

    def put(self, folder: Path) -> None:
        """Copies a checkpoint, in the place of one of the same step."""
        target = f"{self._path}/{folder.name}"
        with self._saying(f"given {folder.name}"):
            self._remove(target)
            self._files.makedirs(target, exist_ok=True)
            for path in sorted(folder.iterdir(), key=lambda path: path.name == FILE):
                self._files.put_file(str(path), f"{target}/{path.name}")

    def retain(self, newest_step: int, keep_last: int, keep_every_steps: int) -> None:
        """As ``store.retain``, among the copies."""
        for step in store.outdated(self.steps(), newest_step, keep_last, keep_every_steps):
            with self._saying("cleaned up"):
                self._remove(f"{self._path}/{manifest.step_name(step)}")

    def fetch_newer(self, checkpoints_dir: Path, than_step: int, report: Callable[[str], None]) -> None:
        """Brings the newest whole copy that is newer, if there is one; a damaged one is told and skipped."""
        for step in self.steps():
            if step <= than_step:
                return
            temporary = store.begin(checkpoints_dir, step)
            source = f"{self._path}/{manifest.step_name(step)}"
            with self._saying("read"):
                for name in self._names(source):
                    if name == FILE or FILE_NAME.fullmatch(name):
                        self._files.get_file(f"{source}/{name}", str(temporary / name))
            try:
                Checkpoint(temporary).verify()
            except CheckpointError as error:
                report(f"copy in {self.url} skipped: {manifest.step_name(step)}, {error}")
                continue
            store.commit(temporary, checkpoints_dir / manifest.step_name(step))
            report(f"{manifest.step_name(step)} was fetched from {self.url}")
            return

    def _names(self, path: str) -> list[str]:
        """Inside of a folder; none where there is no such folder."""
        self._files.invalidate_cache()
        with suppress(FileNotFoundError, NotADirectoryError):
            return [PurePosixPath(found).name for found in self._files.ls(path, detail=False)]
        return []

    def _remove(self, path: str) -> None:
        names = self._names(path)
        for name in sorted(names, key=lambda name: name != FILE):  # without it the rest is no checkpoint
            self._files.rm_file(f"{path}/{name}")
        if names:
            with suppress(FileNotFoundError):  # where folders are but parts of names
                self._files.rmdir(path)

    @contextmanager
    def _saying(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # every backend of fsspec has errors of its own
            raise CheckpointError(
                f"checkpoint.bucket={self.url} cannot be {what} ({reason_of(error)}); when it can, the "
                'same command goes on, without it checkpoint.bucket=""'
            ) from error
