"""Tensor parallelism: the plain model with its layers replaced, split as the table of ``layout.py`` says.

Heads of attention and of fast weights are split whole, so S never leaves its rank. A block's input is
copied to the ranks once, behind its norm, and its output is summed once, in ``o_proj`` and ``down_proj``
(Megatron-LM, arXiv 1909.08053). With sequence parallelism h is split over tokens between blocks (arXiv
2205.05198), and copy and sum become gather and reduce-scatter.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sleeptrain.model.fast_weight import FastWeight
from sleeptrain.model.layers import Float32Linear, RMSNorm
from sleeptrain.model.sleep import CrossEntropy, SleepModel
from sleeptrain.parallel.mcore import ModelParallelConfig
from sleeptrain.parallel.mcore import tensor_parallel as mcore
from sleeptrain.parallel.topology import Group


def split_model(model: SleepModel, group: Group, sequence_parallel: bool) -> None:
    """Replaces layers in place; their weights are allocated anew (on the current device) and not filled."""
    config = _mcore_config(group.size(), sequence_parallel)
    if sequence_parallel:
        model.token_part = (group.rank(), group.size())
    for block in model.stack.blocks:
        if block is None:
            continue
        block.mixer_norm = _copied(block.mixer_norm, group, sequence_parallel)
        _split_linears(block.mixer, config, group)
        if block.mlp is not None:
            block.mlp_norm = _copied(block.mlp_norm, group, sequence_parallel)
            _split_linears(block.mlp, config, group)
        if isinstance(block.mixer, FastWeight):
            block.mixer.num_heads //= group.size()
            _split_vectors(block.mixer, group)
        else:
            _split_width_norms(block.mixer, group)
    if model.holds_embedding:
        model.embed = _Embedding(model.embed, config, group)
    if model.holds_head:
        model.head = _Head(model.head, config, group)
        model.cross_entropy = _CrossEntropy(group)
    for name, parameter in list(getattr(model, "initial_memory", {}).items()):
        model.initial_memory[name] = _part_of(parameter, group)


def _split_linears(module: nn.Module, config: ModelParallelConfig, group: Group) -> None:
    for name, child in list(module.named_children()):
        if not isinstance(child, nn.Linear) or name == "kernel_in":
            continue
        if isinstance(child, Float32Linear):  # stays what it is, with fewer rows
            child.weight = _part_of(child.weight, group)
            child.out_features = len(child.weight)
        elif name in ("o_proj", "down_proj"):
            setattr(module, name, _Row(child, config, group))
        else:
            setattr(module, name, _Column(child, group))


def _split_vectors(module: nn.Module, group: Group) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, _part_of(parameter, group))


def _split_width_norms(module: nn.Module, group: Group) -> None:
    for name in ("q_width_norm", "k_width_norm"):
        norm = getattr(module, name)
        if isinstance(norm, RMSNorm):
            setattr(module, name, _SplitNorm(norm, group))


def _part_of(parameter: Tensor, group: Group) -> nn.Parameter:
    """Room for this rank's rows."""
    return nn.Parameter(torch.empty_like(parameter[: len(parameter) // group.size()]))


def _mcore_config(size: int, sequence_parallel: bool) -> ModelParallelConfig:
    # use_cpu_initialization: else weights are allocated on cuda; they are filled by model/init.py
    return ModelParallelConfig(
        tensor_model_parallel_size=size,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
        perform_initialization=False,
    )


def _unused(weight: Tensor) -> None:
    """megatron-core asks for an init method and never calls it: see ``perform_initialization``."""


def _copied(norm: nn.Module, group: Group, sequence_parallel: bool) -> nn.Module:
    """What stands before a mixer or an MLP, a norm or nothing, with its output on all tensor ranks."""
    if isinstance(norm, RMSNorm):
        return _CopiedNorm(norm, group, sequence_parallel)
    return _Copied(group, sequence_parallel)


class _Copied(nn.Module):
    """Hands h to all tensor ranks: its gradient is their sum."""

    def __init__(self, group: Group, sequence_parallel: bool) -> None:
        super().__init__()
        self.group, self.sequence_parallel = group, sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        if not self.sequence_parallel:
            return mcore.copy_to_tensor_model_parallel_region(x, self.group)
        return mcore.gather_from_sequence_parallel_region(_tokens_first(x), group=self.group).transpose(0, 1)


class _CopiedNorm(RMSNorm):
    """A norm whose output goes to all tensor ranks."""

    def __init__(self, norm: RMSNorm, group: Group, sequence_parallel: bool) -> None:
        super().__init__(len(norm.weight), norm.eps, norm.zero_centred)
        self.copy = _Copied(group, sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:
        return self.copy(super().forward(x))


class _SplitNorm(RMSNorm):
    """A norm over channels of which each rank has a part: the mean of squares is that of all."""

    def __init__(self, norm: RMSNorm, group: Group) -> None:
        super().__init__(len(norm.weight) // group.size(), norm.eps, norm.zero_centred)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = mcore.reduce_from_tensor_model_parallel_region(
            x32.square().mean(-1, keepdim=True), self.group
        )
        # Each rank's channels see a part of the gradient of the mean: it is summed, too.
        squares = mcore.copy_to_tensor_model_parallel_region(squares, self.group) / self.group.size()
        return x32 * torch.rsqrt(squares + self.eps) * self.factor


class _Cast:
    """Casts before megatron-core's own linear function, whose backward pass knows autocast on CUDA alone."""

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **named: Any) -> Tensor:
        if torch.is_autocast_enabled(input.device.type):
            dtype = torch.get_autocast_dtype(input.device.type)
            input, weight = input.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        return super()._forward_impl(input, weight, bias=bias, **named)  # type: ignore[misc]


class _Column(_Cast, mcore.ColumnParallelLinear):
    """Some of the output channels; the copied norm before it sums the gradient of its input."""

    def __init__(self, linear: nn.Linear, group: Group) -> None:
        super().__init__(
            linear.in_features,
            linear.out_features,
            config=_mcore_config(group.size(), sequence_parallel=False),
            init_method=_unused,
            bias=linear.bias is not None,
            disable_grad_reduce=True,
            tp_group=group,
        )
        self.register_state_dict_post_hook(_without_extra_state)
        self.out_features = self.output_size_per_partition

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class _Row(_Cast, mcore.RowParallelLinear):
    """Some of the input channels; the outputs are summed over the ranks."""

    def __init__(self, linear: nn.Linear, config: ModelParallelConfig, group: Group) -> None:
        super().__init__(
            linear.in_features,
            linear.out_features,
            config=config,
            init_method=_unused,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=group,
        )
        self.register_state_dict_post_hook(_without_extra_state)

    def forward(self, x: Tensor) -> Tensor:
        if not self.sequence_parallel:
            return super().forward(x)[0]
        return super().forward(_tokens_first(x))[0].transpose(0, 1)


class _Embedding(mcore.VocabParallelEmbedding):
    """Some of the words."""

    def __init__(self, embedding: nn.Embedding, config: ModelParallelConfig, group: Group) -> None:
        super().__init__(
            embedding.num_embeddings,
            embedding.embedding_dim,
            init_method=_unused,
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
            tp_group=group,
        )

    def forward(self, ids: Tensor) -> Tensor:
        h = super().forward(ids)
        return h.transpose(0, 1) if self.reduce_scatter_embeddings else h


class _Head(_Cast, mcore.ColumnParallelLinear):
    """The logits of some of the words."""

    def __init__(self, linear: nn.Linear, config: ModelParallelConfig, group: Group) -> None:
        super().__init__(
            linear.in_features,
            linear.out_features,
            config=config,
            init_method=_unused,
            bias=False,
            tp_group=group,
        )
        self.register_state_dict_post_hook(_without_extra_state)

    def forward(self, h: Tensor) -> Tensor:
        if not self.sequence_parallel:
            return super().forward(h)[0]
        return super().forward(_tokens_first(h))[0].transpose(0, 1)


class _CrossEntropy(CrossEntropy):
    """Over logits that are split by vocabulary; in float32, whatever they are."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return mcore.vocab_parallel_cross_entropy(logits.contiguous(), targets)

    def predict(self, logits: Tensor) -> Tensor:
        best, ids = logits.max(dim=-1)
        ids = ids + self.group.rank() * logits.shape[-1]
        gathered = [torch.empty_like(best) for _ in range(self.group.size())]
        dist.all_gather(gathered, best, group=self.group)
        winner = torch.stack(gathered).argmax(dim=0)
        ids = ids.masked_fill(winner != self.group.rank(), 0)
        dist.all_reduce(ids, group=self.group)
        return ids


def _tokens_first(x_BTD: Tensor) -> Tensor:
    """megatron-core splits dimension 0 over the sequence."""
    return x_BTD.transpose(0, 1).contiguous()


def _without_extra_state(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    state.pop(f"{prefix}_extra_state", None)
