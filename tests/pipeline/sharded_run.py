"""Run by test_processes.py under torchrun: the command line with FSDP2, on processors (see tests/train/sharded.py)."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

import sharded

from luthier.cli import main

if __name__ == "__main__":
    sharded.pretend()
    torch.distributed.init_process_group("gloo")
    main()
