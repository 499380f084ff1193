"""What computes a model's network, and in which number format: recorded in a bundle's card, started by `Bundle.start`.

Four runtimes, all behind the same model, whose normalisation, boxes and ranking stay what they are, in fp32:

- `eager`: torch as it is. In 16 bits the weights of convolutions and full layers are stored so, once, and the model
  runs under autocast, as it does when it is trained or validated in 16 bits; what it gives is fp32 again.
- `compile`: the same, its network compiled by torch when it is started. It takes a C++ compiler and up to minutes.
- `onnxruntime`, `openvino`: the network is exported to ONNX in memory and run by a library of the extra `engines`, on
  CPUs. No file is kept: a bundle's weights stay the only ones, and nothing of another origin is ever loaded.

Every runtime takes as many threads as torch has when it is started. `jobs.optimize` measures which of them is quick and
answers as fp32 does (`pipeline.evaluation.tuning`). Integers of 8 bits are left out: they need calibration.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import util
from typing import Any, Literal, Self, cast

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.utils import _pytree as tree

from pipeline.batch import Batch
from pipeline.config import Strict
from pipeline.errors import ConfigError
from pipeline.models import Model
from pipeline.models._contract import ModelConfig
from pipeline.models._detector import Detector
from pipeline.types import Frame

Runtime = Literal["eager", "compile", "onnxruntime", "openvino"]
Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS: dict[Runtime, tuple[Precision, ...]] = {
    "eager": ("fp32", "bf16", "fp16"),
    "compile": ("fp32", "bf16", "fp16"),
    "onnxruntime": ("fp32",),
    "openvino": ("fp32", "bf16"),
}
PACKAGES: dict[Runtime, tuple[str, ...]] = {
    "onnxruntime": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
}
"""What a runtime needs besides torch; modules are called as their packages."""
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ADVISERS = ("onnxscript", "onnx_ir", "torch.onnx", "torch.utils.cpp_extension")
"""Loggers of libraries that tell how they optimise."""
EXPORTED = 2  # images of the example: torch takes a batch of one for a constant
_Run = Callable[[Tensor], list[Tensor]]
"""An exported network: float32 [B, C, H, W] -> its output tensors, in the order of their structure."""


class Engine(Strict):
    """A runtime and a precision; the default computes as the model was trained.

    Attributes:
        runtime: see the module.
        precision: of convolutions and matrix products. `fp16` is for GPUs.
    """

    runtime: Runtime = "eager"
    precision: Precision = "fp32"

    @model_validator(mode="after")
    def _has_precision(self) -> Self:
        known = PRECISIONS[self.runtime]
        if self.precision not in known:
            raise ValueError(f"runtime {self.runtime} has the precisions {', '.join(known)}, got {self.precision}")
        return self

    def __str__(self) -> str:
        """As tables and tags name it: `openvino-bf16`."""
        return f"{self.runtime}-{self.precision}"

    @property
    def packages(self) -> tuple[str, ...]:
        """What it needs besides torch."""
        return PACKAGES.get(self.runtime, ())


PLAIN = Engine()


def check(engine: Engine, device: torch.device | str = "cpu") -> None:
    """Refuse what this machine cannot run.

    Raises:
        ConfigError: a library or the compiler is not installed, or the engine is not for this device.
    """
    check_installed(engine)
    kind = torch.device(device).type
    if engine.packages and kind != "cpu":
        raise ConfigError(f"engine {engine} runs on cpu, got {kind}; take runtime eager or compile there")
    if engine.precision == "fp16" and kind == "cpu":
        raise ConfigError(f"engine {engine} is for GPUs, got cpu; take bf16 or fp32 there")
    if engine.precision == "bf16" and kind == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise ConfigError(f"engine {engine}: {torch.cuda.get_device_name(device)} does not compute in bf16; take fp16")
    compiler = (os.environ.get("CXX") or "g++").split()[0]  # as torch finds it
    if engine.runtime == "compile" and kind == "cpu" and shutil.which(compiler) is None:
        raise ConfigError(f"engine {engine} needs a C++ compiler, and there is no {compiler} here; install g++")


def check_installed(engine: Engine) -> None:
    """Refuse an engine whose libraries are not there.

    Raises:
        ConfigError: they are not.
    """
    missing = [name for name in engine.packages if util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"engine {engine} needs {' and '.join(missing)}, not installed here: install ventral[engines], or take a "
            "bundle with another engine"
        )


def candidates(device: torch.device | str = "cpu") -> list[Engine]:
    """Every engine that this machine can run, the plain one first."""
    known = [Engine(runtime=name, precision=one) for name, precisions in PRECISIONS.items() for one in precisions]
    return [engine for engine in known if _runs(engine, device)]


def start(model: Model, config: ModelConfig, engine: Engine, device: torch.device | str = "cpu") -> None:
    """Make `model`, in evaluation mode on `device`, compute on an engine, in place; the names of its parts stay.

    Args:
        model: its weights are in fp32.
        config: that it was built from.
        engine: what computes it from now on.
        device: where it is.

    Raises:
        ConfigError: this machine cannot run the engine, or the engine not this model.
    """
    check(engine, device)
    if engine.packages:
        _replace(model, config, engine)
        return
    if engine.precision != "fp32":
        _narrow(model, DTYPES[engine.precision], torch.device(device))
    if engine.runtime == "compile":
        _compile(model, config, engine, device)


def blank(model: Model, config: ModelConfig, num_images: int) -> Batch:
    """Pictures without content, of the largest size that the model is shown, and with a proposal where it needs one."""
    size_hw = model.spec.largest_hw
    images = torch.zeros(num_images, model.spec.num_channels, *size_hw, dtype=torch.uint8)
    whole = torch.tensor([[0, 0, size_hw[1], size_hw[0]]], dtype=torch.float32)
    proposals = (whole,) * num_images if config.needs_proposals else ()
    return Batch(images, frames=(Frame(size_hw, size_hw),) * num_images, proposals=proposals)


def _runs(engine: Engine, device: torch.device | str) -> bool:
    try:
        check(engine, device)
    except ConfigError:
        return False
    return True


def _narrow(model: Model, dtype: torch.dtype, device: torch.device) -> None:
    """Store the weights of matrix products in 16 bits, and let autocast bring them together with all the rest."""
    for layer in model.network.modules():
        if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd):
            layer.to(dtype)
    plain = model.forward

    def forward(batch: Batch) -> Any:
        with torch.autocast(device.type, dtype):
            outputs = plain(batch)
        return tree.tree_map_only(Tensor, _widened, outputs)

    model.forward = forward  # type: ignore[method-assign]


def _widened(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _compile(model: Model, config: ModelConfig, engine: Engine, device: torch.device | str) -> None:
    """Compile now, for one image and for any number, so that no request waits for it."""
    model.network.compile(dynamic=True)
    try:
        with torch.inference_mode(), _silent():
            for num_images in (EXPORTED, 1):
                model(blank(model, config, num_images).to(device))
    except Exception as error:  # whatever compilers and torch's many layers raise
        raise ConfigError(_failed(engine, config, error)) from None


def _replace(model: Model, config: ModelConfig, engine: Engine) -> None:
    """Put the exported network in the place of what `model.network` computes."""
    network, plain = model.network, model.network.forward
    example = _seen(model, config)
    try:
        with torch.no_grad(), _silent():
            leaves, structure = tree.tree_flatten(network(example))
            exported = _exported(network, example, sizes_vary=isinstance(model, Detector))
            run = _RUNNERS[engine.runtime](exported, engine.precision, torch.get_num_threads())
    except Exception as error:  # exporters and runtimes raise whatever they like
        raise ConfigError(_failed(engine, config, error)) from None
    assert all(isinstance(leaf, Tensor) for leaf in leaves)

    def forward(images: Tensor) -> Any:
        if not len(images):  # regions of pictures that have none
            return plain(images)
        return tree.tree_unflatten(run(images.detach().contiguous()), structure)

    network.forward = forward
    model.forward = _alone(model.forward)  # type: ignore[method-assign]
    model.postprocess = _alone(model.postprocess)  # type: ignore[method-assign]


def _alone(method: Callable[..., Any]) -> Any:
    """The same in one thread of torch's.

    Those of OpenMP spin for a while after their work and take the CPUs from the runtime's: AlexNet on 2 CPUs answers
    about 8 images in 14 ms instead of 20.
    """

    @functools.wraps(method)
    def alone(*args: Any, **kwargs: Any) -> Any:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return method(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    return alone


def _seen(model: Model, config: ModelConfig) -> Tensor:
    """What the network is given when the model is shown blank pictures: not of their size in every model."""
    given: list[Tensor] = []
    hook = model.network.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    try:
        with torch.no_grad():
            model(blank(model, config, EXPORTED))
    finally:
        hook.remove()
    return torch.zeros(EXPORTED, *given[0].shape[1:])


class _Flat(nn.Module):
    """A network whose outputs are a tuple of tensors."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(tree.tree_leaves(self.network(images)))


def _exported(network: nn.Module, example: Tensor, *, sizes_vary: bool) -> bytes:
    """The network as an ONNX model for any number of images, and of any size where sizes vary and it takes them."""
    dims = torch.export.Dim
    shape = {0: dims.DYNAMIC} | ({2: dims.AUTO, 3: dims.AUTO} if sizes_vary else {})
    program = torch.onnx.export(_Flat(network), (example,), dynamo=True, dynamic_shapes=(shape,), verbose=False)
    assert program is not None
    return cast(bytes, program.model_proto.SerializeToString())


def _onnxruntime(exported: bytes, precision: Precision, num_threads: int) -> _Run:
    import onnxruntime  # noqa: PLC0415  (optional, as below)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    # Idle threads that spin would take the CPU from those that decode.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(exported, options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return lambda images: [torch.from_numpy(one) for one in session.run(None, {given.name: images.numpy()})]


@functools.cache
def _core() -> Any:
    """OpenVINO's, one in a process and for as long as it lives.

    Its CPU plugin gives the thread that loads it a stack for signals, and gives back the one before when it goes. Of
    two plugins that go in the order in which they came, the thread is left with the stack of one that is gone, and the
    next signal that Python handles ends the process without a word.
    """
    import openvino  # noqa: PLC0415

    return openvino.Core()


def _openvino(exported: bytes, precision: Precision, num_threads: int) -> _Run:
    import openvino  # noqa: PLC0415

    core = _core()
    hints = {
        "INFERENCE_NUM_THREADS": num_threads,
        "INFERENCE_PRECISION_HINT": {"fp32": "f32"}.get(precision, precision),
        "PERFORMANCE_HINT": "LATENCY",  # one batch at a time, with all threads
    }
    compiled = core.compile_model(core.read_model(exported), "CPU", hints)
    request, numbers = compiled.create_infer_request(), range(len(compiled.outputs))

    def run(images: Tensor) -> list[Tensor]:
        request.infer([openvino.Tensor(images.numpy(), shared_memory=True)])
        return [torch.from_numpy(request.get_output_tensor(number).data.copy()) for number in numbers]

    return run


_RUNNERS: dict[Runtime, Callable[[bytes, Precision, int], _Run]] = {"onnxruntime": _onnxruntime, "openvino": _openvino}


@contextmanager
def _silent() -> Iterator[None]:
    """Keep exporters and compilers from advice about code that is not the user's."""
    loggers = [logging.getLogger(name) for name in ADVISERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _failed(engine: Engine, config: ModelConfig, error: Exception) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:160]
    return f"engine {engine} cannot run {config.name}: {type(error).__name__}: {first}; take another engine"
