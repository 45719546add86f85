"""Which weight is trained by what, and both optimizers behind one step (method: section 4).

Muon trains the matrices of the blocks; AdamW everything else: embeddings, head, norms, biases, A_log,
dt_bias, depthwise convolutions. Norms, A_log, dt_bias, learned initial fast weights and the bias of learned
halting take no weight decay.
"""

from typing import Any

import torch
from torch import Tensor, nn

from sleeptrain.config import OptimConfig
from sleeptrain.optim.muon import Muon
from sleeptrain.optim.patterns import rate_factor

ADAMW_STATE = ("exp_avg", "exp_avg_sq")


def is_muon(name: str, shape: torch.Size) -> bool:
    """A matrix of a block; the kernels of a depthwise convolution are no matrix."""
    return ".blocks." in name and len(shape) == 2 and not name.endswith("_conv")


def takes_decay(name: str) -> bool:
    exempt = "norm" in name or "initial_memory" in name
    return not (exempt or name.endswith(("A_log", "dt_bias", "halting_head.bias")))


class MuonAdamW:
    """Both optimizers over the named parameters of a model that take gradients; learning rates are peak rates
    times a factor."""

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        self.config = config
        self.names = {id(p): name for name, p in model.named_parameters()}
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = [(name, p) for name, p in named if is_muon(name, p.shape)]
        rest = [(name, p) for name, p in named if not is_muon(name, p.shape)]
        self.muon = Muon(
            self._groups(matrices, config.weight_decay),  # type: ignore[arg-type]
            lr=config.muon_lr,
            momentum=config.muon_momentum,
            num_steps=config.muon_steps,
            scale=config.muon_scale,
            weight_decay=config.weight_decay,
            precision=config.muon_precision,
        )
        self.adamw = torch.optim.AdamW(
            self._groups([(name, p) for name, p in rest if takes_decay(name)], config.weight_decay)
            + self._groups([(name, p) for name, p in rest if not takes_decay(name)], 0.0),
            lr=config.adamw_lr,
            betas=(config.adamw_beta1, config.adamw_beta2),
            fused=True,
        )
        self.num_updates = 0

    def _groups(self, named: list[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
        """One for each factor on the learning rate; that of 1 may be empty."""
        by_factor: dict[float, list[nn.Parameter]] = {1.0: []}
        for name, parameter in named:
            by_factor.setdefault(rate_factor(name, self.config), []).append(parameter)
        return [
            {"params": parameters, "weight_decay": weight_decay, "rate_factor": factor}
            for factor, parameters in sorted(by_factor.items())
        ]

    def step(self, lr_factor: float) -> None:
        """One update from the gradients in place."""
        for optimizer, peak in ((self.muon, self.config.muon_lr), (self.adamw, self.config.adamw_lr)):
            for group in optimizer.param_groups:
                group["lr"] = peak * group["rate_factor"] * lr_factor
            optimizer.step()
        self.num_updates += 1

    def state(self) -> dict[str, Tensor]:
        """Tensors by logical name, as in ``stack.blocks.0.mixer.q_proj.weight/momentum``; the step count only
        once."""
        tensors = {"num_updates": torch.tensor(self.num_updates)}
        for optimizer, keys in ((self.muon, ("momentum",)), (self.adamw, ADAMW_STATE)):
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                values = optimizer.state.get(parameter, {})
                for key in keys if self.num_updates else ():
                    moment = values[key] if key in values else torch.zeros_like(parameter)  # never a gradient
                    tensors[f"{self.names[id(parameter)]}/{key}"] = moment
        return tensors

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Takes over what ``state`` returned; KeyError where a tensor is missing."""
        self.num_updates = int(tensors["num_updates"])
        for optimizer, keys in ((self.muon, ("momentum",)), (self.adamw, ADAMW_STATE)):
            optimizer.state.clear()
            if self.num_updates == 0:
                continue
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                name = self.names[id(parameter)]
                values = {key: tensors[f"{name}/{key}"].to(parameter.device).clone() for key in keys}
                if optimizer is self.adamw:
                    values["step"] = torch.tensor(float(self.num_updates), device=parameter.device)
                optimizer.state[parameter] = values
