"""A whole run: its name and place, all sections, and the checks between them."""

from dataclasses import dataclass, field
from typing import Literal

from sleeptrain.config.checks import require_in
from sleeptrain.config.data import DataConfig
from sleeptrain.config.model import ModelConfig
from sleeptrain.config.processes import ClusterConfig, ParallelConfig
from sleeptrain.config.sleep import SleepConfig
from sleeptrain.config.tasks import GSMInfiniteConfig, Rule110Config, TaskConfig, TextConfig
from sleeptrain.config.training import CheckpointConfig, EvalConfig, LogConfig, OptimConfig
from sleeptrain.schema import ConfigError, setting


@dataclass(frozen=True)
class RunConfig:
    """The run's name and place, its seed, and the device."""

    id: str = setting("quickstart", "name of the run; the same id again resumes")
    dir: str = setting("runs/${run.id}", "run folder")
    seed: int = setting(0, "seed of the initial weights, the data order and a sampled N")
    init_from: str = setting(
        "", "run or checkpoint folder whose weights a new run starts with, instead of random ones"
    )
    init_new: tuple[str, ...] = setting(
        (),
        "patterns of weights that init_from lacks and that keep their own: [stack.blocks.4.*] is a new block",
    )
    max_new_fraction: float = setting(1.0, "largest share of the model's weights that init_new may name")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda if there is one")
    precision: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "compute type over float32 weights; auto: float32 on cpu, bfloat16 on cuda"
    )
    num_threads: int = setting(
        0, "CPU threads of torch; 0: torch's choice (resume on another count is not bit-equal)"
    )
    deterministic: bool = setting(True, "deterministic algorithms only")
    compile: bool = setting(
        False, "have torch.compile fuse norms, SwiGLU and rotary positions; takes seconds at the start"
    )
    cuda_graphs: bool = setting(
        False, "record each kind of pass once and replay it; computes every pass again in the backward pass"
    )
    check_replicas_every_steps: int = setting(
        10, "compare the bits of all replicas' weights each so many steps and before a save; 0: never"
    )
    hang_timeout_seconds: int = setting(
        600, "without progress for so long, end the run and leave the stacks of all ranks in logs/; 0: never"
    )
    allow_config_change: bool = setting(False, "resume although settings that shape the result differ")

    def __post_init__(self) -> None:
        require_in("run", self, ("check_replicas_every_steps", "hang_timeout_seconds"), 0)
        require_in("run", self, ("max_new_fraction",), 0, 1)
        if self.init_new and not self.init_from:
            raise ConfigError(
                f"run.init_new={list(self.init_new)} is for run.init_from, which is not given; without it "
                "all weights are new"
            )


@dataclass(frozen=True)
class Config:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    sleep: SleepConfig = field(default_factory=SleepConfig)
    task: TaskConfig = field(default_factory=Rule110Config)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    dry_run: bool = setting(False, "print the model, the plan of visits and the cost over N, and stop")

    @property
    def window_tokens(self) -> int:
        return self.sleep.window_tokens or self.task.sequence_tokens

    def __post_init__(self) -> None:
        if self.sleep.window_tokens > self.task.sequence_tokens:
            raise ConfigError(
                f"sleep.window_tokens={self.sleep.window_tokens} is longer than the task's sequence of "
                f"{self.task.sequence_tokens} tokens; use at most that, or 0 for one single window"
            )
        self._check_answer_window()
        most_passes = max((self.sleep.num_passes, *self.eval.num_passes))
        if most_passes > 1 and not any(block.is_fast_weight for block in self.model.core_blocks):
            raise ConfigError(
                f"N={most_passes} passes need a fast-weight block among the looped blocks, and model.pattern="
                f"{self.model.pattern!r} has none there; add gdn or jet, or set sleep.num_passes=1 and "
                "eval.num_passes=[]"
            )
        if self.sleep.learned_initial_state and not any(block.is_fast_weight for block in self.model.blocks):
            raise ConfigError("sleep.learned_initial_state=true needs a gdn or jet block in model.pattern")
        if self.sleep.carry_between_batches:
            self._check_carry()
        if self.run.deterministic and any(block.is_fast_weight for block in self.model.blocks):
            self._check_kernels_repeat()
        if self.run.cuda_graphs:
            self._check_graphs()
        if self.data.producer == "ray":
            self._check_producer_has_ray()
        self._check_workers()

    def _check_kernels_repeat(self) -> None:
        """Those of others may compute other bits in the next run."""
        backend = self.model.memory_backend
        why = {"fla": "chooses its tiles by timing them", "flash_qla": "does not say that it does"}.get(
            backend
        )
        if why:
            raise ConfigError(
                "run.deterministic=true means that a run repeats bit for bit, and "
                f"model.memory_backend={backend} {why}; set model.memory_backend=auto or triton, or "
                "run.deterministic=false"
            )

    def _check_graphs(self) -> None:
        """A graph keeps no activations, and its tensors stay where they are."""
        checkpointing, parallel = self.sleep.activation_checkpointing, self.parallel
        if checkpointing not in ("pass", "both"):
            raise ConfigError(
                "run.cuda_graphs=true computes passes again in the backward pass, and "
                f"sleep.activation_checkpointing={checkpointing} keeps them; set it to pass or both"
            )
        for name, value, largest in (
            ("tensor_size", parallel.tensor_size, 1),
            ("pipeline_size", parallel.pipeline_size, 1),
            ("zero_stage", parallel.zero_stage, 2),
        ):
            if value > largest:
                raise ConfigError(
                    "run.cuda_graphs=true needs the whole weights of a replica in one process, and "
                    f"parallel.{name}={value} splits them; set it to {largest}, or run.cuda_graphs=false"
                )

    def _check_producer_has_ray(self) -> None:
        if self.cluster.kind != "ray":
            raise ConfigError(
                f"data.producer=ray makes shards in tasks of Ray, and cluster.kind={self.cluster.kind} has "
                "none; set cluster=ray, or make them before with tools/make_shards.py"
            )
        if isinstance(self.task, TextConfig):
            raise ConfigError(
                "data.producer=ray makes the examples of a task, and task=text reads documents; make their "
                "shards with tools/make_shards.py, and leave data.producer out"
            )

    def _check_workers(self) -> None:
        """The numbers of processes that a run may have are made of whole replicas."""
        most, per_replica = self.cluster.workers(self.parallel), self.parallel.per_replica
        fewest = self.cluster.min_workers
        if self.cluster.kind in ("local_procs", "ray") and most % per_replica:
            raise ConfigError(
                f"cluster.num_workers={most} is no multiple of the {per_replica} processes of a replica "
                "(parallel.tensor_size x parallel.pipeline_size); choose a multiple"
            )
        if fewest is None:
            return
        if fewest > most or fewest % per_replica:
            raise ConfigError(
                f"cluster.min_workers={fewest} must be a multiple of {per_replica} up to "
                f"cluster.num_workers={most}"
            )
        if self.parallel.data_size is not None:
            raise ConfigError(
                f"cluster.min_workers={fewest} lets the number of replicas change, and parallel.data_size="
                f"{self.parallel.data_size} fixes it; set cluster.num_workers and parallel.data_size=null"
            )

    def _check_carry(self) -> None:
        """Something must be left to carry, and rows must go on where the batch before ended."""
        is_kept = self.sleep.eviction == "sliding" or any(block.is_fast_weight for block in self.model.blocks)
        if not is_kept:
            raise ConfigError(
                "sleep.carry_between_batches=true has nothing to carry: "
                f"model.pattern={self.model.pattern!r} has no gdn or jet block, and sleep.eviction=hard "
                "keeps no keys and values; change one of them"
            )
        if not self.data.shards:
            raise ConfigError(
                "sleep.carry_between_batches=true goes on with long documents in data.shards, and this run "
                "makes its examples, which do not go on; set data.shards, or leave it out"
            )

    def _check_answer_window(self) -> None:
        """The answers of a synthetic task are in the last window, and unless they share it alone there."""
        length, task = self.sleep.window_tokens, self.task
        if not length or isinstance(task, TextConfig):
            return
        context, answers = task.context_tokens, task.sequence_tokens - task.context_tokens
        if isinstance(task, GSMInfiniteConfig) and task.answer_window == "shared":
            last = task.sequence_tokens % length or length
            if last < answers:
                raise ConfigError(
                    f"sleep.window_tokens={length} leaves {last} of the {task.sequence_tokens} tokens of "
                    f"task.sequence_tokens to the last window, which must hold task.answer_tokens={answers}; "
                    "change one of them"
                )
        elif context % length or answers > length:
            fitting = [n for n in range(answers, context + 1) if context % n == 0]
            nearest = min(fitting, key=lambda n: abs(n - length), default=0)
            raise ConfigError(
                f"sleep.window_tokens={length} does not fit task {task.name}: {context} tokens to read, then "
                f"{answers} to answer in a window of their own; use sleep.window_tokens={nearest} or another "
                f"divisor of {context} from {answers} up"
            )
