"""What the trainer talks to: forward/backward, step, evaluate, and the state of a run's tensors."""

import math
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from sleeptrain import memory
from sleeptrain.checkpoint.slices import Slice, whole
from sleeptrain.config import Config, SleepConfig
from sleeptrain.data.batch import Batch
from sleeptrain.model.graphs import PassGraphs
from sleeptrain.model.halting import Stop
from sleeptrain.model.pointwise import compiled, use
from sleeptrain.model.sleep import Output, PassTrace, SleepModel
from sleeptrain.optim.optimizer import MuonAdamW
from sleeptrain.optim.patterns import fits
from sleeptrain.parallel.carried import Carried
from sleeptrain.schema import ConfigError

if TYPE_CHECKING:
    from sleeptrain.checkpoint.initial import InitialWeights
    from sleeptrain.checkpoint.reader import Checkpoint


class StepResult(NamedTuple):
    """Mean loss per target of a batch, in nats, as a tensor on the device; where asked for, by pass the norms
    of the fast weights and of their change by it, means over sequences and blocks."""

    loss: Tensor
    memory_norms: dict[int, tuple[float, float]]


class UpdateResult(NamedTuple):
    """Loss, global gradient norm before clipping, and whether the update was made: not if one of them is not
    finite, or the norm above the limit."""

    loss: float
    grad_norm: float
    applied: bool


class Backend(Protocol):
    """One or many processes; the trainer never asks which."""

    device: torch.device

    def forward_backward(self, batch: Batch, num_passes: int, traced: bool = False) -> StepResult: ...
    def step(self, lr_factor: float, loss: Tensor, max_norm: float = math.inf) -> UpdateResult: ...
    def check_replicas(self) -> str | None: ...
    def evaluate(self, batch: Batch, num_passes: int, stop: Stop | None = None) -> Output: ...
    def slices(self) -> dict[str, list[Slice]]: ...
    def load(self, checkpoint: "Checkpoint") -> None: ...
    def start_from(self, weights: "InitialWeights") -> None: ...


class LocalBackend:
    """Plain torch in one process."""

    def __init__(self, config: Config, vocab_size: int) -> None:
        self.config, self.device = config, choose_device(config.run.device)
        self.model = SleepModel(config.model, config.sleep, vocab_size, config.run.seed).to(self.device)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not fits(name, config.optim.frozen))
        speed_up(self.model, config)
        self.optimizer = MuonAdamW(self.model, config.optim)
        self.carried = Carried(self.model, config.data.batch_sequences)

    def forward_backward(self, batch: Batch, num_passes: int, traced: bool = False) -> StepResult:
        """Gradients of the mean loss over the batch's targets, summed over its microbatches; where halting is
        learned of its cost, too."""
        micro, num_targets = self.config.data.micro_batch, batch.num_targets
        loss = torch.zeros((), device=self.device)
        trace: list[PassTrace] = []
        for start in range(0, len(batch.ids), micro):
            rows = slice(start, start + micro)
            part, state = batch.rows(rows).to(self.device), self.carried.read(rows)
            with self.autocast():
                output = self.model(part, num_passes, state, trace if traced else None, self.carried.is_on)
                part_loss = output.loss_sum / num_targets
                cost = halting_cost(output, self.config.sleep) / len(batch.ids)
            (part_loss + cost).backward()
            loss += part_loss.detach()
            self.carried.write(rows, output.state)
        return StepResult(loss + self.carried.doubt(), mean_norms(trace))

    def step(self, lr_factor: float, loss: Tensor, max_norm: float = math.inf) -> UpdateResult:
        """Clips, updates, clears the gradients; leaves weights and optimizer untouched when loss or norm is
        not finite, or the norm above ``max_norm``."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        loss_value, grad_norm = torch.stack([loss, norm]).tolist()  # the one wait for the device in a step
        applied = math.isfinite(loss_value) and math.isfinite(grad_norm) and grad_norm <= max_norm
        if applied:
            if self.config.optim.clip_norm:
                torch.nn.utils.clip_grads_with_norm_(parameters, self.config.optim.clip_norm, norm)
            self.optimizer.step(lr_factor)
        for parameter in parameters:
            parameter.grad = None
        self.carried.settle(applied)
        return UpdateResult(loss_value, grad_norm, applied)

    def check_replicas(self) -> str | None:
        """What is wrong with the copies that processes hold of the weights: here there is one."""
        return None

    @torch.no_grad()
    def evaluate(self, batch: Batch, num_passes: int, stop: Stop | None = None) -> Output:
        with self.autocast():
            return self.model(batch.to(self.device), num_passes, stop=stop)

    def slices(self) -> dict[str, list[Slice]]:
        """What a checkpoint holds, ``model``, ``optimizer`` and what is carried: here every tensor as a
        whole."""
        model = [whole(name, p) for name, p in self.model.named_parameters()]
        optimizer = [whole(name, t) for name, t in self.optimizer.state().items()]
        return {"model": model, "optimizer": optimizer, **self.carried.slices()}

    def load(self, checkpoint: "Checkpoint") -> None:
        """Takes over weights, optimizer and what is carried. ValueError or KeyError with the names where they
        are not this run's, CheckpointError where they are damaged."""
        self.load_model(checkpoint)
        self.optimizer.load(checkpoint.read_all("optimizer"))
        self.carried.load(checkpoint)

    @torch.no_grad()
    def start_from(self, weights: "InitialWeights") -> None:
        """Takes over weights that another run made; what it does not hold keeps its initial values, and new
        blocks add nothing."""
        for name, parameter in self.model.named_parameters():
            if weights.holds(name):
                parameter.copy_(weights.read(name))
            elif weights.is_zero(name):
                parameter.zero_()

    @torch.no_grad()
    def load_model(self, checkpoint: "Checkpoint") -> None:
        """Takes over weights; ValueError with the names when they are not exactly this model's."""
        own, saved = dict(self.model.named_parameters()), set(checkpoint.names("model"))
        wrong = sorted(own.keys() ^ saved)
        wrong += [name for name in own.keys() & saved if own[name].shape != checkpoint.shape("model", name)]
        if wrong:
            raise ValueError(
                f"the checkpoint's weights are not this model's; they differ in {', '.join(wrong[:5])}"
            )
        for name, values in checkpoint.read_all("model").items():
            own[name].copy_(values)

    def autocast(self) -> AbstractContextManager:
        """What every forward pass is inside of."""
        return autocast(self.config, self.device)


def halting_cost(output: Output, sleep: SleepConfig) -> Tensor | float:
    """Of the expected passes beyond reading, in nats, summed over sequences and the windows they sleep on."""
    return 0.0 if output.passes is None else sleep.halting_cost * (output.passes - 1).clamp_min(0).sum()


def mean_norms(trace: list[PassTrace]) -> dict[int, tuple[float, float]]:
    """By pass, the norm of S and of its change, from squares that hold all heads."""
    of_passes: dict[int, list[Tensor]] = {}
    for t in trace:
        of_passes.setdefault(t.pass_number, []).append(torch.stack([t.norm, t.update]).sqrt().flatten(1))
    means = {n: torch.cat(parts, dim=1).mean(1).tolist() for n, parts in sorted(of_passes.items())}
    return {n: (norm, update) for n, (norm, update) in means.items()}


def choose_device(setting: str) -> torch.device:
    """``auto`` takes CUDA where there is one; ConfigError where it is asked for and absent."""
    if setting == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if setting == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device=cuda, but torch sees no CUDA device; use run.device=cpu or auto")
    return torch.device(setting)


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA and float32 on CPU unless ``run.precision`` says otherwise."""
    if config.run.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.run.precision]


def memory_backend(config: Config) -> memory.Choice:
    """What runs the rule of the fast weights in this run, and why. Raises ConfigError for one that cannot."""
    device, model = choose_device(config.run.device), config.model
    dtype, sizes = compute_dtype(config, device), (model.memory_key_dim, model.memory_value_dim)
    return memory.choose(device.type, dtype, sizes[0], model.memory_backend, sizes[1], model.rule)


def require_graphs(config: Config) -> None:
    """Raises ConfigError where CUDA graphs are asked for and there is no CUDA device."""
    if config.run.cuda_graphs and choose_device(config.run.device).type != "cuda":
        raise ConfigError(
            f"run.cuda_graphs=true needs a CUDA device, and run.device={config.run.device} means the CPU "
            "here; set run.cuda_graphs=false"
        )


def speed_up(model: SleepModel, config: Config) -> None:
    """Compiled functions and recorded passes, as the run asks for them."""
    if config.run.compile:
        use(model, compiled())
    if config.run.cuda_graphs:
        dtype = compute_dtype(config, model.final_norm.weight.device)
        model.graphs = PassGraphs(model.stack, torch.bfloat16 if dtype == torch.bfloat16 else None)


def autocast(config: Config, device: torch.device) -> AbstractContextManager:
    """The same around every forward pass, whatever the backend."""
    enabled = compute_dtype(config, device) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)
