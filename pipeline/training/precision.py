"""Number formats, memory layout, compilation and synchronised statistics: how a model is made ready to be trained.

`fp32` computes as the weights are stored. `bf16` and `fp16` run convolutions and matrix products in 16 bits, with
weights and sums in 32 (`pipeline.evaluation.live.autocast`). fp16 has too small a range for gradients: its loss is
scaled up, and a step whose gradients overflow is left out (Micikevicius et al. 2018, section 3.2).
"""

from __future__ import annotations

from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn

from pipeline.errors import ConfigError
from pipeline.evaluation.live import Precision

ModelT = TypeVar("ModelT", bound=nn.Module)


def grad_scaler(precision: Precision, device: torch.device | str) -> torch.amp.GradScaler:
    """Scales the loss for `fp16`, and does nothing for the others; its `state_dict()` belongs into a checkpoint."""
    return torch.amp.GradScaler(torch.device(device).type, enabled=precision == "fp16")


def check(precision: Precision, device: torch.device | str) -> None:
    """Refuse what the device does not compute.

    Raises:
        ConfigError: bf16 on a GPU from before 2020.
    """
    if precision == "bf16" and torch.device(device).type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise ConfigError(
            f"precision: {torch.cuda.get_device_name(device)} does not compute in bf16; take fp16 or fp32"
        )


def arrange(model: ModelT, *, channels_last: bool, sync_batch_norm: bool) -> ModelT:
    """The model in another memory layout, and with batch normalisation over all workers' images; call it before DDP.

    Weights and names stay. `sync_batch_norm` is for GPUs, where torch has it, and changes nothing in a single process.
    """
    if channels_last:
        model.to(memory_format=torch.channels_last)
    several = dist.is_initialized() and dist.get_world_size() > 1
    on_gpu = any(parameter.is_cuda for parameter in model.parameters())
    if sync_batch_norm and several and on_gpu:
        model = cast(ModelT, nn.SyncBatchNorm.convert_sync_batchnorm(model))  # type: ignore[no-untyped-call]
    return model


def compile_network(model: nn.Module) -> None:
    """Let torch compile `model.network` when it is first called, in place: names in the state dict do not change.

    The rest of a model (checks of shapes, postprocessing) is Python that would only break the graph.
    """
    cast(nn.Module, model.network).compile()
