"""The training loop: next batch, forward/backward, step, log, evaluate, save; it resumes by default, bit for
bit."""

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.utils.deterministic

from sleeptrain.checkpoint.bucket import Bucket
from sleeptrain.checkpoint.durable import replace_file
from sleeptrain.checkpoint.manifest import CheckpointError
from sleeptrain.checkpoint.saver import Saver
from sleeptrain.config import Config
from sleeptrain.data.corpus import open_task
from sleeptrain.data.mixture import Mixture, open_mixture
from sleeptrain.data.stream import ORDER_BITS, TrainStream
from sleeptrain.engine.evaluation import StoppedError, as_row, as_table, check_difficulties, evaluate
from sleeptrain.engine.figures import draw_learning_curve
from sleeptrain.engine.garbage import collected_between_steps
from sleeptrain.engine.guard import SkipGuard
from sleeptrain.engine.interval import Interval, WorkOfSteps
from sleeptrain.engine.logs import rank_log
from sleeptrain.engine.metrics import FILE_NAME, MetricsWriter, NoMetrics, peak_memory_gib, read_metrics
from sleeptrain.engine.mirror import check_wandb
from sleeptrain.engine.progress import Progress
from sleeptrain.engine.rerun import ReplicasDifferError, Reruns
from sleeptrain.engine.resilience import EXIT_REQUEUE, RunLock, StopSignal, cut_metrics
from sleeptrain.engine.resume import (
    check_initial_weights,
    initial_weights,
    newest_checkpoint,
    open_bucket,
    origin_of,
    refuse_drift,
    require_fitting_moments,
    require_same_run,
    versions,
)
from sleeptrain.engine.retrofit import budget_lines, check_budget
from sleeptrain.engine.secrets import refuse_secrets
from sleeptrain.engine.watchdog import Watchdog
from sleeptrain.model.flops import peak_flops
from sleeptrain.optim.schedule import lr_factor, num_passes_at
from sleeptrain.parallel.backend import memory_backend, require_graphs
from sleeptrain.parallel.place import Place, make_backend, open_place, rank_given
from sleeptrain.schema import ConfigError, to_dict
from sleeptrain.tasks import Task


def train(config: Config, frozen_config: str) -> int:
    """Trains to the end or to a stop signal; returns the exit code. ``frozen_config`` is written as
    config.yaml. Every process of the run calls it."""
    refuse_secrets(config)
    check_wandb(config)
    memory_backend(config)
    require_graphs(config)
    folder = Path(config.run.dir)
    RunLock(folder).check()
    refuse_drift(folder / "checkpoints", config)
    task = open_task(config.task)
    vocab_size = config.model.rounded_vocab(task.vocab_size)
    check_budget(config, vocab_size)
    check_initial_weights(folder / "checkpoints", config, vocab_size)
    check_difficulties(task, config.eval.difficulties)
    mixture, bucket = open_mixture(config, task), open_bucket(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"run.dir={folder} cannot be made a folder ({error.strerror}); choose another"
        ) from error
    rank = rank_given()
    with (
        rank_log(folder, rank) as log,
        Watchdog(config.run.hang_timeout_seconds, log.parent, rank) as watchdog,
        open_place(config, vocab_size, task.sequence_tokens) as place,
    ):
        watchdog.meet(place.world_size)
        _check_same_config(place, frozen_config)
        with RunLock(folder) if place.rank == 0 else nullcontext(), StopSignal() as stop:
            place.barrier()  # nobody works in the folder before the first has its lock
            inputs = (config, task, folder, frozen_config, place, mixture, bucket)
            return Trainer(*inputs, watchdog.note).run(stop)


def _check_same_config(place: Place, frozen_config: str) -> None:
    if place.from_first(frozen_config) != frozen_config:
        raise ConfigError(
            f"rank {place.rank} was started with other settings than rank 0; give all processes the same "
            "arguments"
        )


class Trainer:
    """One run in its folder: the backend, the data order and everything that a checkpoint holds."""

    def __init__(
        self,
        config: Config,
        task: Task,
        folder: Path,
        frozen_config: str,
        place: Place,
        mixture: Mixture | None = None,
        bucket: Bucket | None = None,
        note: Callable[[str], None] = lambda doing: None,
    ) -> None:
        """``note`` hears of all progress, and what comes next."""
        self.config, self.task, self.folder, self.place, self.note = config, task, folder, place, note
        note("making the model")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic cuBLAS asks for it
        if config.run.num_threads:
            torch.set_num_threads(config.run.num_threads)
        # Not use_deterministic_algorithms: that loads the compiler, and would fill every empty tensor.
        torch.set_deterministic_debug_mode("error" if config.run.deterministic else "default")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        self.vocab_size = config.model.rounded_vocab(task.vocab_size)
        self.backend = make_backend(config, self.vocab_size, place)
        self.stream = TrainStream(
            task,
            config.run.seed,
            config.data.batch_sequences,
            config.sleep.window_tokens,
            place.replica,
            place.num_replicas,
            mixture,
            config.data.num_workers,
        )
        self.guard, self.reruns = SkipGuard(config.optim), Reruns()
        self.interval = Interval()
        self.work_of = WorkOfSteps(config, task.sequence_tokens, self.vocab_size)
        kept = (config.checkpoint.keep_last, config.checkpoint.keep_every_steps)
        self.saver = Saver(
            folder / "checkpoints", *kept, place.rank, place.world_size, place.barrier, bucket=bucket
        )
        self.step = 0
        self.owes_evaluation = False  # a stop came amid that of this step: the resumed run makes it
        data = task.fingerprint() | (mixture.fingerprint() if mixture else {})
        self.documents = {"config": to_dict(config), "data": data, "versions": versions()}
        if not self._resume() and config.run.init_from:
            self.backend.start_from(weights := initial_weights(config, self.vocab_size))
            self.documents |= origin_of(weights.checkpoint)
        if place.rank == 0:
            replace_file(folder / "config.yaml", frozen_config.encode())
            cut_metrics(folder / FILE_NAME, self.step)

    def run(self, stop: StopSignal) -> int:
        """The loop. Returns 0 at the end, EXIT_REQUEUE after a stop signal."""
        config, num_steps = self.config, self.config.optim.num_steps
        progress = Progress(num_steps, self.step)
        writes = self.place.rank == 0
        metrics = MetricsWriter(self.folder, config, progress.line) if writes else NoMetrics()
        progress.line(f"run {config.run.id}: step {self.step} of {num_steps} in {self.folder}")
        for line in budget_lines(config, self.vocab_size):
            progress.line(line)
        if any(block.is_fast_weight for block in config.model.blocks):
            progress.line("fast weights by the {} backend: {}".format(*memory_backend(config)))
        try:
            self._loop(stop, metrics, progress)
            self._last_save(metrics, progress)
            metrics.sync()
            if self._is_done():
                metrics.finish()
        finally:
            self._warn(self.saver.close(), progress)
            self.stream.close()
            progress.close()
            metrics.close()
        if not self._is_done():
            reason = stop.requested or "a signal to another process"
            print(f"stopped by {reason}; the same command goes on from step {self.saver.committed_step}")
            stop.has_stopped = True
            return EXIT_REQUEUE
        if self.place.rank > 0:
            return 0
        for path in draw_learning_curve(read_metrics(self.folder), self.folder / "figures", config.run.id):
            print(f"wrote {path}")
        return 0

    def _is_done(self) -> bool:
        return self.step == self.config.optim.num_steps and not self.owes_evaluation

    def _loop(self, stop: StopSignal, metrics: MetricsWriter | NoMetrics, progress: Progress) -> None:
        """Steps until the last one is made or a stop is asked for."""
        first = self.step + 1
        with collected_between_steps() as collect:
            while not self._is_done() and not self.place.any(bool(stop.requested)):
                try:
                    if not self.owes_evaluation:
                        self._train_step(metrics, progress)
                    if self.step == first:  # now all moments are there
                        self.saver.prepare(self.backend.slices())
                    self._evaluate_and_save(stop, metrics, progress)
                except ReplicasDifferError as found:
                    self._go_back(found, metrics, progress)
                self._warn(self.saver.result(), progress)
                collect(self.step)
                self.note(f"after step {self.step}")

    def _train_step(self, metrics: MetricsWriter | NoMetrics, progress: Progress) -> None:
        """One step, and what is said of it."""
        memory_norms, config = self.train_step(), self.config
        if self.guard.warning:
            progress.line(self.guard.warning)
            self.guard.check()
        if _due(self.step, config.run.check_replicas_every_steps):
            self._check_replicas()
        figures = None
        if _due(self.step, config.log.every_steps):
            row = self._training_row(memory_norms)
            metrics.write(self.step, row)
            figures = _shown(row)
        progress.update(self.step, figures)
        self.owes_evaluation = self._is_due(config.eval.every_steps)

    def _evaluate_and_save(
        self, stop: StopSignal, metrics: MetricsWriter | NoMetrics, progress: Progress
    ) -> None:
        if self.owes_evaluation:
            self._evaluate(stop, metrics, progress)
        if self._is_due(self.config.checkpoint.every_steps) and not self.owes_evaluation:
            self._save(metrics, progress)

    def _is_due(self, every_steps: int) -> bool:
        return _due(self.step, every_steps) or self.step == self.config.optim.num_steps

    def train_step(self) -> dict[int, tuple[float, float]]:
        """One optimizer step; returns the norms of S by pass on steps whose row is due."""
        config, step = self.config, self.step
        start = time.perf_counter()
        batch = self.place.from_reader(lambda: self.stream.batch(step))
        self.interval.data_seconds += time.perf_counter() - start
        num_passes = num_passes_at(step, config.sleep, config.optim.num_steps, config.run.seed)
        traced = _due(step + 1, config.log.every_steps)
        result = self.backend.forward_backward(batch, num_passes, traced)
        factor = lr_factor(step, config.optim)
        update = self.backend.step(factor, result.loss, self.guard.max_norm)
        self.guard.record(step + 1, update)
        loss = update.loss if update.applied else None
        self.interval.add(loss, update.grad_norm, num_passes, factor, self.work_of(batch, num_passes))
        self.interval.seconds += time.perf_counter() - start
        self.step += 1
        return result.memory_norms

    def _training_row(self, memory_norms: dict[int, tuple[float, float]]) -> dict[str, Any]:
        """Means over the steps since the last row, and the newest value of everything else."""
        interval, config = self.interval, self.config
        step_tokens = config.data.batch_sequences * self.task.sequence_tokens
        row: dict[str, Any] = {
            "train/loss": interval.mean_loss(),
            "train/grad_norm": interval.grad_norm,
            "train/muon_lr": config.optim.muon_lr * interval.lr_factor,
            "train/adamw_lr": config.optim.adamw_lr * interval.lr_factor,
            "train/num_passes": interval.num_passes,
            "train/tokens": self.step * step_tokens,
            "train/skipped_steps": self.guard.total,
            "train/tokens_per_second": interval.num_steps * step_tokens / interval.seconds,
            "train/pass_tokens_per_second": interval.work.pass_tokens / interval.seconds,
            "train/step_seconds": interval.seconds / interval.num_steps,
            "train/data_seconds": interval.data_seconds / interval.num_steps,
            "train/memory_gib": peak_memory_gib(self.backend.device),
            "train/sample_order": sum(state["order"] for state in self._data_states()) % 2**ORDER_BITS,
        }
        for n, (norm, update) in memory_norms.items():
            row[f"memory/norm/pass_{n}"], row[f"memory/update/pass_{n}"] = norm, update
        row |= self._utilisation()
        self.interval = Interval()
        return row

    def _utilisation(self) -> dict[str, float]:
        """Model and hardware FLOPs utilisation, where the peak of the device is known."""
        if self.backend.device.type != "cuda":
            return {}
        peak = peak_flops(torch.cuda.get_device_name(self.backend.device))
        if peak is None:
            return {}
        return self.interval.work.utilisation(self.interval.seconds, peak)

    def _evaluate(self, stop: StopSignal, metrics: MetricsWriter | NoMetrics, progress: Progress) -> None:
        self.note(f"evaluating after step {self.step}")
        config, start = self.config, time.perf_counter()
        num_passes = sorted({config.sleep.num_passes, *config.eval.num_passes})
        try:
            sizes = (config.eval.num_examples, config.eval.batch_sequences, config.sleep.window_tokens)
            asked = (num_passes, config.eval.difficulties, *sizes)
            results = evaluate(
                self.backend, self.task, "validation", *asked, lambda: self.place.any(bool(stop.requested))
            )
        except StoppedError:
            return
        self.owes_evaluation = False
        row = as_row(results, self.task.difficulty_name, config.sleep.num_passes)
        metrics.write(self.step, row | {"eval_seconds": time.perf_counter() - start})
        progress.line(f"held out, after step {self.step}:\n{as_table(results, self.task.difficulty_name)}")

    def _save(self, metrics: MetricsWriter | NoMetrics, progress: Progress) -> None:
        """Begins a checkpoint of the current step; it is written while the training goes on.

        Amid skipped updates nothing is saved: such checkpoints would push out the good ones, and the steps
        since the last one can be made again.
        """
        if self.guard.in_a_row and self.step < self.config.optim.num_steps:
            return
        self.note(f"saving step {self.step}")
        self._check_replicas()
        metrics.sync()
        trainer = {
            "step": self.step,
            "guard": self.guard.state(),
            "interval": self.interval.state(),
            "data": self._data_states(),
            "owes_evaluation": self.owes_evaluation,
        }
        self._warn(self.saver.wait(), progress)
        self.note(f"saving step {self.step}")  # the save before it is over
        self.saver.save(self.step, self.backend.slices(), self.documents | {"trainer": trainer})

    def _data_states(self) -> list[dict[str, Any]]:
        """Of all replicas, in their order."""
        own = self.stream.state() if self.place.reads_data else None
        return [state for state in self.place.gathered(own) if state is not None]

    def _last_save(self, metrics: MetricsWriter | NoMetrics, progress: Progress) -> None:
        """Returns when the last step is on the disk. At the end of the run it raises CheckpointError if that
        fails; before, a full disk costs the checkpoint and not the run."""
        self.note("waiting for the last save")
        failure = self.saver.wait()
        if self.step == self.config.optim.num_steps and failure:
            raise failure
        self._warn(failure, progress)
        if self.step > self.saver.committed_step:
            try:
                self._save(metrics, progress)
            except ReplicasDifferError as found:
                progress.line(f"warning: {found}; it is not saved")
            self._warn(self.saver.wait(), progress)
        self.note("ending")

    def _check_replicas(self) -> None:
        found = self.backend.check_replicas()
        if found:
            raise ReplicasDifferError(f"after step {self.step} {found}")

    def _go_back(
        self, found: ReplicasDifferError, metrics: MetricsWriter | NoMetrics, progress: Progress
    ) -> None:
        """To the newest checkpoint, to make the steps since then again; RunError where that is no help."""
        self._warn(self.saver.wait(), progress)
        self.interval = Interval()
        progress.line(self.reruns.record(found, self.step if self._resume() else None))
        metrics.cut(self.step)

    def _warn(self, failure: CheckpointError | None, progress: Progress) -> None:
        if failure:
            progress.line(f"warning: {failure}; training goes on")

    def _resume(self) -> bool:
        """Goes on from the newest valid checkpoint, if there is one; raises ConfigError when it belongs to
        another run."""
        found = newest_checkpoint(self.folder / "checkpoints", self.place, self.saver.bucket)
        if found is None:
            return False
        require_same_run(found, self.documents, self.config.run.allow_config_change)
        try:
            require_fitting_moments(found)
            self.backend.load(found)
            saved = found.documents["trainer"]
            self.guard.load(saved["guard"])
            self.interval.load(saved["interval"])
            self.stream.load(saved["data"], found.step)
            self.owes_evaluation = saved.get("owes_evaluation", False)
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{found.path} does not fit this run: {error}; choose another run.id"
            ) from error
        self.documents |= origin_of(found)
        self.step = self.saver.committed_step = found.step
        return True


def _due(step: int, every_steps: int) -> bool:
    return every_steps > 0 and step % every_steps == 0


def _shown(row: dict[str, Any]) -> dict[str, str]:
    loss = row["train/loss"]
    return {
        "loss": "none" if loss is None else f"{loss:.4f}",
        "N": str(row["train/num_passes"]),
        "lr": f"{row['train/muon_lr']:.2e}",
        "tok/s": f"{row['train/tokens_per_second']:,.0f}",
    }
