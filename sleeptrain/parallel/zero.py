"""Gradients and weights spread over the data-parallel replicas: not at all, or by DeepSpeed's ZeRO (arXiv
1910.02054).

DeepSpeed is the sharder alone. Gradients add up over all visits of all microbatches before they are
reduced once; between that and DeepSpeed's own step, which is elementwise, the caller sees the fragments
of weights and gradients that this replica owns and may change the gradients. What of DeepSpeed's inside
is read here is read nowhere else, and ``tests/distributed/test_zero.py`` pins the version that it was
written for.
"""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sleeptrain.config import Config, OptimConfig
from sleeptrain.model.sleep import SleepModel
from sleeptrain.optim.optimizer import ADAMW_STATE, is_muon, takes_decay
from sleeptrain.optim.patterns import rate_factor
from sleeptrain.parallel.cpu_compat import prepare_deepspeed
from sleeptrain.parallel.layout import bucket_elements
from sleeptrain.parallel.stage import Held
from sleeptrain.parallel.topology import Topology, all_reduce_flat


class Fragment(NamedTuple):
    """The elements ``start``, ``start + 1``, ... in row-major order of a parameter that this replica
    owns: a view of its float32 weights ``[n]``."""

    held: Held
    start: int
    weight: Tensor


class Shards(Protocol):
    """One parameter's owner is one replica, or each has a part of it."""

    model: nn.Module  # to be called in place of the plain model
    loss_factor: float  # by what a loss is to be multiplied, so that gradients are summed over the replicas
    fragments: list[Fragment]
    copies: list[Held]  # of which every replica has the whole

    def reduced_at_end(self) -> AbstractContextManager[None]:
        """Around all backward passes of a step."""

    def gradients(self) -> list[Tensor]:
        """Of the fragments, ``[n]``, summed over the replicas; views, to be changed in place."""

    def step(self, lr_factor: float) -> None:
        """The elementwise update, and the new weights to every replica."""

    def discard(self) -> None:
        """Forgets the gradients and leaves everything else as it is."""

    def moment(self, fragment: int, key: str) -> Tensor:
        """A view of AdamW's moment of a fragment, zero before the first step."""

    def refresh(self, num_updates: int) -> None:
        """After weights and moments were written from outside."""


class ElementwiseStep(torch.optim.AdamW):
    """AdamW; for the weights of Muon, whose gradient is then its update, p <- (1 - lr wd) p - lr update.
    Frozen weights have a rate of 0: DeepSpeed's sharder wants all there are."""

    def __init__(self, held: list[Held], config: OptimConfig) -> None:
        groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
        for h in held:
            key = (is_muon(h.name, h.shape), takes_decay(h.name), rate_factor(h.name, config))
            groups.setdefault(key, []).append(h.parameter)
        super().__init__(
            [
                {
                    "params": parameters,
                    "is_muon": of_muon,
                    "peak_lr": factor * (config.muon_lr if of_muon else config.adamw_lr),
                    "weight_decay": config.weight_decay if decays else 0.0,
                }
                for (of_muon, decays, factor), parameters in sorted(groups.items(), key=lambda item: item[0])
            ],
            lr=config.adamw_lr,
            betas=(config.adamw_beta1, config.adamw_beta2),
            fused=True,
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        every_group = self.param_groups
        for group in every_group:
            if group["is_muon"]:
                with_gradient = [p for p in group["params"] if p.grad is not None]
                if with_gradient:
                    torch._foreach_mul_(with_gradient, 1 - group["lr"] * group["weight_decay"])
                    torch._foreach_add_(with_gradient, [p.grad for p in with_gradient], alpha=-group["lr"])
        self.param_groups = [group for group in every_group if not group["is_muon"]]
        super().step()
        self.param_groups = every_group

    def set_rate(self, lr_factor: float) -> None:
        for group in self.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor

    def moment_of(self, parameter: Tensor, key: str) -> Tensor:
        """Of a whole parameter of the groups, made where there is none yet."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state |= {
                k: torch.zeros_like(parameter, memory_format=torch.preserve_format) for k in ADAMW_STATE
            }
        return state[key]

    def set_num_updates(self, num_updates: int) -> None:
        for state in self.state.values():
            if "step" in state:
                state["step"].fill_(num_updates)


class Replicated:
    """ZeRO stage 0: every replica holds everything."""

    def __init__(self, model: SleepModel, held: list[Held], config: Config, topology: Topology) -> None:
        self.model: nn.Module = model
        self.loss_factor, self.data, self.copies = 1.0, topology.data, held
        self.optimizer = ElementwiseStep(held, config.optim)
        self.fragments = [Fragment(h, 0, h.parameter.data.view(-1)) for h in held]

    @contextmanager
    def reduced_at_end(self) -> Iterator[None]:
        yield
        for fragment in self.fragments:
            parameter = fragment.held.parameter
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.data.size() > 1:
            all_reduce_flat(self.gradients(), self.data)

    def gradients(self) -> list[Tensor]:
        return [f.held.parameter.grad.view(-1) for f in self.fragments if f.held.parameter.grad is not None]

    def step(self, lr_factor: float) -> None:
        self.optimizer.set_rate(lr_factor)
        self.optimizer.step()
        self.discard()

    def discard(self) -> None:
        for fragment in self.fragments:
            fragment.held.parameter.grad = None

    def moment(self, fragment: int, key: str) -> Tensor:
        return self.optimizer.moment_of(self.fragments[fragment].held.parameter, key).view(-1)

    def refresh(self, num_updates: int) -> None:
        self.optimizer.set_num_updates(num_updates)


class Zero:
    """ZeRO stages 1 and 2: each replica owns flat ranges of the optimizer state (and of the gradients)."""

    def __init__(self, model: SleepModel, held: list[Held], config: Config, topology: Topology) -> None:
        self.model: nn.Module = model
        self.copies = held
        self.loss_factor = float(topology.data.size())  # the engine takes the mean over replicas
        self.optimizer = ElementwiseStep(held, config.optim)
        self.engine = _engine(model, self.optimizer, config, topology)
        self.sharder = self.engine.optimizer
        owned = [h for h in held if h.parameter._hp_mapping is not None]  # type: ignore[attr-defined]
        maps = [h.parameter._hp_mapping for h in owned]  # type: ignore[attr-defined]
        self.fragments = [
            Fragment(h, m.lp_fragment_address.start, m.hp_fragment) for h, m in zip(owned, maps)
        ]

    def reduced_at_end(self) -> AbstractContextManager[None]:
        return self.engine.coalesce_grad_reduction()

    def gradients(self) -> list[Tensor]:
        parameters: list[Any] = [f.held.parameter for f in self.fragments]
        gradients = [p._hp_mapping.get_lp_grad_fragment(p._index_in_param_group) for p in parameters]
        return [gradient.view(-1) for gradient in gradients]

    def step(self, lr_factor: float) -> None:
        self.optimizer.set_rate(lr_factor)
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.step()

    def discard(self) -> None:
        # The engine drops an update whose gradient is not finite, and knows best what to clean up then. Of
        # gradients that went to the host it only looks at the norms that they arrived with.
        for gradient in self.gradients()[:1]:
            gradient.fill_(torch.nan)
        if self.sharder.cpu_offload:
            norms = self.sharder.norm_for_param_grads
            norms |= {key: torch.full_like(norm, torch.nan) for key, norm in norms.items()}
        self.step(0.0)

    def moment(self, fragment: int, key: str) -> Tensor:
        mapping: Any = self.fragments[fragment].held.parameter._hp_mapping  # type: ignore[attr-defined]
        flat = self.sharder.single_partition_of_fp32_groups[mapping.param_group_index]
        address = mapping.hp_fragment_address
        return self.optimizer.moment_of(flat, key).narrow(0, address.start, address.numel)

    def refresh(self, num_updates: int) -> None:
        self.optimizer.set_num_updates(num_updates)
        self.sharder.update_lp_params()


class Zero3:
    """ZeRO stage 3: each replica owns a flat range of every weight too, and gathers a block's when it
    comes."""

    def __init__(self, model: SleepModel, held: list[Held], config: Config, topology: Topology) -> None:
        self.copies: list[Held] = []
        self.loss_factor = float(topology.data.size())
        self.optimizer = ElementwiseStep(held, config.optim)
        self.engine = _engine(model, self.optimizer, config, topology)
        self.model, self.sharder, rank = self.engine, self.engine.optimizer, topology.data.rank()
        self.fragments = []
        for h in held:
            parameter: Any = h.parameter
            room, num_elements = parameter.ds_tensor.ds_numel, parameter.ds_numel
            start = min(rank * room, num_elements)
            owned = min(room, num_elements - start)  # the last ranges are filled up with zeros
            self.fragments.append(Fragment(h, start, self._flat(parameter)[:owned]))

    def reduced_at_end(self) -> AbstractContextManager[None]:
        return self.engine.coalesce_grad_reduction()

    def gradients(self) -> list[Tensor]:
        parameters: list[Any] = [f.held.parameter for f in self.fragments]
        partitions = [self.sharder._get_fp32_grad_state_partition(p, False)[0] for p in parameters]
        return [x[: len(f.weight)] for x, f in zip(partitions, self.fragments)]

    def step(self, lr_factor: float) -> None:
        self.optimizer.set_rate(lr_factor)
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.step()

    def discard(self) -> None:
        for gradient in self.gradients()[:1]:
            gradient.fill_(torch.nan)
        self.step(0.0)

    def moment(self, fragment: int, key: str) -> Tensor:
        f = self.fragments[fragment]
        flat = self._flat(f.held.parameter, key)
        return flat[: len(f.weight)]

    def refresh(self, num_updates: int) -> None:
        self.optimizer.set_num_updates(num_updates)
        self.sharder._partition_all_parameters()
        for i in range(len(self.sharder.fp16_groups)):
            self.sharder._reassign_or_swap_out_partitioned_parameters(i)
        small: Any = self.sharder.persistent_parameters  # these stay gathered
        if small:
            small[0].all_gather(small)

    def _flat(self, parameter: Any, key: str | None = None) -> Tensor:
        group, start, length = self.sharder.grad_position[self.sharder.get_param_id(parameter)]
        flat = self.sharder.fp32_partitioned_groups_flat[group]
        values = flat if key is None else self.optimizer.moment_of(flat, key)
        return values.data.narrow(0, start, length)


def make_shards(model: SleepModel, held: list[Held], config: Config, topology: Topology) -> Shards:
    """What ``parallel.zero_stage`` asks for."""
    if config.parallel.zero_stage == 0:
        return Replicated(model, held, config, topology)
    if config.parallel.zero_stage == 3:
        return Zero3(model, held, config, topology)
    return Zero(model, held, config, topology)


def _engine(model: nn.Module, optimizer: ElementwiseStep, config: Config, topology: Topology) -> Any:
    prepare_deepspeed(topology.device)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)  # it warns of every optimizer that it does not know
    num_elements = sum(p.numel() for p in model.parameters())
    zero: dict[str, Any] = {
        "stage": config.parallel.zero_stage,
        "overlap_comm": False,
        "reduce_bucket_size": bucket_elements(num_elements),
        # How far it looks for the next use of a weight before it gives it up. Blocks that loop come again
        # within one pass; its default, a billion weights, is all passes of a small model, each time.
        "stage3_max_reuse_distance": num_elements,
    }
    if config.parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": topology.device.type == "cuda"}
    replicas = topology.data.size()
    settings = {
        "train_batch_size": replicas,  # it only counts samples by these
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=settings, mpu=_Groups(topology), dist_init_required=False
    )
    return engine


class _Groups:
    """The groups as DeepSpeed asks for them. Of tensor and pipeline ranks it hears nothing: it would reduce a
    norm per parameter group over them, of which stages have different ones, and wait for ever. Norm and
    refusal are agreed on by all processes before its step."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology

    def get_model_parallel_group(self) -> None:
        return None

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_data_parallel_group(self) -> Any:
        return self.topology.data

    def get_data_parallel_rank(self) -> int:
        return self.topology.data.rank()

    def get_data_parallel_world_size(self) -> int:
        return self.topology.data.size()
