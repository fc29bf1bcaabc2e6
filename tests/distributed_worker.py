"""
What one of two processes does in the tests of distributed training: gradients of its share of a batch, under DDP and
both kinds of FSDP, to be compared with those of one process on the whole batch; then scripts/finetune.py with the
arguments that follow the folder for the results, straight, and killed as by `kill -9`.
"""

import functools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from builders import random_pixels, small_model
from finetune_script import at_step, finetune, kill
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

LEARNING_RATE = 0.1


def pixels() -> torch.Tensor:
    return random_pixels(4, 3, 128, 96, seed=1)


def step(model: torch.nn.Module, batch: torch.Tensor, backward: Callable[[torch.Tensor], None]) -> torch.Tensor:
    """Gradients of one step of plain gradient descent, which is made; returns its loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    loss = model(pixel_values=batch).last_hidden_state.square().mean()
    backward(loss)
    optimizer.step()
    return loss.detach()


def with_ddp(accelerator: Accelerator, batch: torch.Tensor) -> dict[str, Any]:
    model = accelerator.prepare_model(small_model().train())
    assert isinstance(model, DistributedDataParallel)
    loss = step(model, batch, accelerator.backward)
    named = dict(model.module.named_parameters())
    return {
        "loss": accelerator.reduce(loss, reduction="mean"),
        "gradients": {name: parameter.grad for name, parameter in named.items()},
        "weights": {name: parameter.detach() for name, parameter in named.items()},
    }


def with_fsdp1(batch: torch.Tensor) -> dict[str, Any]:
    model = small_model().train()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=1, auto_wrap_policy="transformer_based_wrap")
    plugin.set_auto_wrap_policy(model)
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=plugin.auto_wrap_policy, device_id=torch.device("cpu"), use_orig_params=True
    )
    units = [name for name, module in wrapped.named_modules() if isinstance(module, FullyShardedDataParallel)]
    loss = step(wrapped, batch, torch.Tensor.backward)
    dist.all_reduce(loss)
    with FullyShardedDataParallel.summon_full_params(wrapped):
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return {
        "loss": loss / 2,
        "units": [name.replace("_fsdp_wrapped_module.", "").replace("_fsdp_wrapped_module", "") for name in units],
        "weights": {name.replace("_fsdp_wrapped_module.", ""): weight for name, weight in weights.items()},
    }


def with_fsdp2(batch: torch.Tensor) -> dict[str, Any]:
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model = small_model().train()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    plugin.set_auto_wrap_policy(model)
    policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
    shard = functools.partial(fully_shard, mesh=init_device_mesh("cpu", (2,)))
    for module in reversed(list(model.modules())):
        if policy(module):
            shard(module)
    shard(model)
    units = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    with warnings.catch_warnings():
        # `patch_embeds` is a view of the features; nothing here writes into it.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        loss = step(model, batch, torch.Tensor.backward)
    dist.all_reduce(loss)
    return {
        "loss": loss / 2,
        "units": units,
        "gradients": {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()},
        "weights": {name: parameter.detach().full_tensor() for name, parameter in model.named_parameters()},
    }


def supports_fsdp() -> bool:
    """Whether torch shards on the CPU, and Accelerate knows both kinds of FSDP."""
    fields = FullyShardedDataParallelPlugin.__dataclass_fields__
    return torch.__version__ >= "2.7" and "fsdp_version" in fields


def main(folder: Path, arguments: list[str]) -> None:
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    share = pixels()[2 * rank :][:2]
    results = {"ddp": with_ddp(accelerator, share)}
    if supports_fsdp():
        results["fsdp1"] = with_fsdp1(share)
        results["fsdp2"] = with_fsdp2(share)
    torch.save(results, folder / f"rank-{rank}.pt")
    # In the same processes: each start costs seconds.
    if finetune.main([*arguments, "--output", str(folder / "straight")]):
        sys.exit(1)
    with pytest.MonkeyPatch.context() as patch:
        at_step(2, kill, patch)
        finetune.main([*arguments, "--output", str(folder / "resumed"), "--save-every-steps", "1"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
