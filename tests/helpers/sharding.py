"""How each kind of wrapper is put around a language model of transformers, on CPUs.

Each takes the model, patched already or not, and the name of a setting.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist


def ddp(model: Any, name: str) -> Any:
    options: dict[str, dict[str, bool]] = {
        "plain": {},
        "unused": {"find_unused_parameters": True},
        "static": {"static_graph": True},
    }
    return torch.nn.parallel.DistributedDataParallel(model, **options[name])


def fsdp2(model: Any, name: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if name == "accelerate":
        return accelerates(model)
    options: dict[str, Any] = {"mesh": init_device_mesh("cpu", (dist.get_world_size(),))}
    if "bf16" in name:
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, **options)
    if "own unit" in name:
        fully_shard(model.lm_head, **options)
    if "root reshards" in name:
        options["reshard_after_forward"] = True
    if "float32 output" in name:
        options["mp_policy"] = MixedPrecisionPolicy(
            torch.bfloat16, torch.float32, output_dtype=torch.float32
        )
    return fully_shard(model, **options)


def accelerates(model: Any) -> Any:
    """The units that accelerate makes: layers, embeddings, (norm, head), the rest."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        is_main_process=True,
        device=torch.device("cpu"),
    )
    return fsdp2_prepare_model(accelerator, model)


def fsdp1(model: Any, name: str) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import CustomPolicy

    units = [*model.model.layers, *([model.lm_head] if "own unit" in name else [])]
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=CustomPolicy(lambda module: module in units),
        use_orig_params="original" in name,
        device_id=torch.device("cpu"),
    )


def zero3(model: Any, name: str) -> Any:
    """DeepSpeed's third stage on one process: a parameter is empty but where its module runs."""
    full: dict[torch.nn.Parameter, torch.Tensor] = {}

    def gather(module: torch.nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = full[parameter]

    def release(module: torch.nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0, dtype=parameter.dtype)

    class BeforeBackward(torch.autograd.Function):  # its PreBackwardFunctionForModule
        @staticmethod
        def forward(ctx: Any, module: torch.nn.Module, output: Any) -> Any:
            ctx.module = module
            return output.detach()

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            gather(ctx.module)
            return None, gradient

    def after(module: torch.nn.Module, args: Any, output: Any) -> Any:
        release(module)
        if torch.is_tensor(output) and output.requires_grad:
            return BeforeBackward.apply(module, output)
        return output

    for module in model.modules():
        if list(module.parameters(recurse=False)):
            for parameter in module.parameters(recurse=False):
                full.setdefault(parameter, parameter.data)
            module.register_forward_pre_hook(lambda m, args: gather(m))
            module.register_forward_hook(after)
            release(module)
    model.everything = full
    return model


WRAPPERS = {"DDP": ddp, "FSDP2": fsdp2, "FSDP1": fsdp1, "ZeRO-3": zero3}


def local(value: torch.Tensor) -> torch.Tensor:
    """What this rank holds of it."""
    part = value.to_local() if hasattr(value, "to_local") else value
    return part.detach().clone()
