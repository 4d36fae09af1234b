"""Several processes, one run: what the first one alone does, and how the others learn of it.

A launcher (`accelerate launch`, `torchrun`) starts the same command once per device; rank 0 is the first. Training is
the work of all. Files, tables and figures are made once: `ranks.first(work)` runs `work` on rank 0 only, and every
rank gets its value. If it fails there, rank 0 raises the error and the others leave with the same exit code, silently.

The processes must see the same files (one machine, or a shared file system). Started without a launcher there is one
rank, and nothing here does anything.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from luthier.errors import ElsewhereError, InputError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from luthier.tune.base import Tuned

T = TypeVar("T")
# One rank may evaluate for hours while the others wait; a launcher ends them all when one dies.
PATIENCE = datetime.timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is."""

    rank: int = 0
    world: int = 1

    @classmethod
    def join(cls, device: str = "auto") -> Ranks:
        """Meet the other processes of this launch, if there are any; `device` as in `environment.device`."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=on_cpu(device), timeout=PATIENCE)
        return cls(state.process_index, state.num_processes)

    def leave(self) -> None:
        """Say goodbye to the other processes, once all is done."""
        if self.world > 1:
            import torch.distributed

            torch.distributed.barrier()
            torch.distributed.destroy_process_group()

    def first(self, work: Callable[[], T]) -> T:
        """The value of `work()`, which only rank 0 calls; every rank must come here, in the same order."""
        if self.world == 1:
            return work()
        if self.rank:
            failed, value = self._share(None)
            if failed:
                raise ElsewhereError(value)
            return value
        try:
            value = work()
        except BaseException as error:
            self._share((True, getattr(error, "exit_code", 4)))
            raise
        self._share((False, value))
        return value

    def agree(self, value: float, largest: bool = True) -> float:
        """The largest (or smallest) of all ranks' values."""
        if self.world == 1:
            return value
        import torch.distributed

        found: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(found, value)
        return max(found) if largest else min(found)

    def _share(self, value: Any) -> Any:
        import torch.distributed

        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]


def on_cpu(device: str) -> bool:
    """Whether `device` (`cpu`, `cuda`, `auto`) means the processor on this machine."""
    import torch

    return device == "cpu" or (device == "auto" and not torch.accelerator.is_available())


def wrapper_options(tuned: Tuned) -> list[Any]:
    """What accelerate is told about wrapping: experts that no token of a step went to, and blocks that rest, have no
    gradient; only then must DDP look for such parameters."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return []
    from accelerate import DistributedDataParallelKwargs

    from luthier.models.topology import Topology

    some = tuned.switches or any(block.experts.count for block in Topology.of(tuned.base_model).blocks)
    return [DistributedDataParallelKwargs(find_unused_parameters=some)]


def refuse_launch(accelerator: Accelerator, tuned: Tuned) -> None:
    """`InputError` where the launcher would cut the weights up in a way that the loop, or this tuning, cannot follow.

    What also depends on the settings (`switches`, soft masks) the tuning says itself, in `on_phase_begin`.
    """
    from accelerate.utils import DistributedType

    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM) or (
        kind == DistributedType.FSDP and not accelerator.is_fsdp2
    ):
        name = "FSDP of version 1" if kind == DistributedType.FSDP else kind.value
        raise InputError(
            f"the launcher is set to {name}, and the loop knows DDP and FSDP of version 2",
            fix="launch with --multi_gpu, or set fsdp_version: 2",
        )
    if kind == DistributedType.FSDP and tuned.averages:
        raise InputError(
            f"tune.method {tuned.settings.method!r} steps parts of whole weights, and FSDP would cut them up",
            fix="launch without FSDP, or take lora",
        )
