"""Run by test_two_processes.py: `two_processes.py` with FSDP2, on processors.

accelerate shards on accelerators only, so here it is told that two gloo processes are such devices; the sharding
itself, its hooks and its collectives are torch's own.
"""

import os
import sys

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from two_processes import main


def prepare_backend(self, cpu=False, sagemaker_dp=False, backend=None):
    return "gloo", DistributedType.MULTI_GPU


def set_device(self):
    self.device = torch.device("cpu")


def pretend():
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    }
    PartialState._prepare_backend = prepare_backend
    PartialState.set_device = set_device


if __name__ == "__main__":
    pretend()
    torch.distributed.init_process_group("gloo")
    main(*sys.argv[1:])
