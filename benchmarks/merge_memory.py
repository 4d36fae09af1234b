"""Memory of merges that do not fit: four checkpoints of 1.5 billion parameters, merged under a hard limit of 1.5 GB.

    python benchmarks/merge_memory.py             makes 12 GB of checkpoints, merges them with linear and with TIES

The shape is that of a Llama of 28 blocks with an embedding of 151,936 x 1,536, in bfloat16 shards. Each merge is a
process of its own that may not take more than 1.5 GB: by a memory cgroup where one can be made (page cache counts
there, and is given up under pressure), else by a limit on the process's data. Written are the peak of the process's own
memory (anonymous pages) beside what its imports take, and the time. Results: benchmarks/results/merge_memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from luthier.weights.info import Info, infos_of
from luthier.weights.reader import Weights
from luthier.weights.writer import write_weights

OUT = Path(__file__).parent / "results" / "merge_memory.json"
LIMIT = 1_500_000_000
WIDTH, INNER, KV, BLOCKS, VOCABULARY = 1536, 8960, 256, 28, 151936
CGROUPS = Path("/sys/fs/cgroup/memory")

CHILD = """
import json, sys, threading, time
from pathlib import Path
import torch
import luthier as lt
import luthier.merge.run, luthier.merge.ties, luthier.merge.linear, luthier.merge.report, matplotlib.figure
import matplotlib.backends.backend_svg

def own():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

torch.randn(64, 64) @ torch.randn(64, 64)
start, peak, running = own(), 0, True

def watch():
    global peak
    while running:
        peak = max(peak, own())
        time.sleep(0.005)

watcher = threading.Thread(target=watch)
watcher.start()
began = time.perf_counter()
method, out, base, *models = sys.argv[1:]
lt.merge(method, base=None if method == "linear" else base, models=models, out=out)
running = False
watcher.join()
print(json.dumps({"imports_bytes": start, "peak_bytes": peak, "seconds": time.perf_counter() - began}))
"""


def shapes() -> dict[str, Info]:
    found = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "model.norm.weight": (WIDTH,)}
    for block in range(BLOCKS):
        for name, shape in {
            "self_attn.q_proj": (WIDTH, WIDTH),
            "self_attn.k_proj": (KV, WIDTH),
            "self_attn.v_proj": (KV, WIDTH),
            "self_attn.o_proj": (WIDTH, WIDTH),
            "mlp.gate_proj": (INNER, WIDTH),
            "mlp.up_proj": (INNER, WIDTH),
            "mlp.down_proj": (WIDTH, INNER),
            "input_layernorm": (WIDTH,),
            "post_attention_layernorm": (WIDTH,),
        }.items():
            found[f"model.layers.{block}.{name}.weight"] = shape
    return {name: Info("BF16", shape) for name, shape in found.items()}


def make(folder: Path) -> list[Path]:
    """The base and three models near it: a block of noise again and again, with other small changes in each."""
    infos, piece = shapes(), 2**22
    block = (torch.randn(piece, generator=torch.Generator().manual_seed(0)) / 50).bfloat16()
    paths = []
    for number in range(4):
        draw = torch.Generator().manual_seed(number)
        change = 1e-3 * torch.randn(piece, generator=draw)
        values = block if number == 0 else (block.float() + change).bfloat16()

        def read(name: str, values: torch.Tensor = values) -> Any:
            for start in range(0, infos[name].elements, piece):
                yield values[: infos[name].elements - start]

        path = folder / f"model-{number}"
        path.mkdir(parents=True)
        write_weights(path, infos, read, shard_bytes=2 * 10**9)
        paths.append(path)
    return paths


def limited() -> tuple[str, Path | None]:
    """How the limit is set: the name of the way, and the cgroup if there is one."""
    group = CGROUPS / f"merge-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(LIMIT))
        return "memory cgroup", group
    except OSError:
        return "limit on data (RLIMIT_DATA)", None


def run(method: str, paths: list[Path], out: Path) -> dict[str, Any]:
    way, group = limited()

    def before() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))
        else:
            resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))

    try:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, method, str(out), *map(str, paths)],
            capture_output=True,
            text=True,
            preexec_fn=before,
        )
    finally:
        if group is not None:
            group.rmdir()
    if done.returncode:
        sys.exit(f"{method}: exit {done.returncode}: {done.stderr[-2000:]}")
    return {"limit": way, **json.loads(done.stdout)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on a disk with 16 GB of room")
    arguments = parser.parse_args()
    infos = shapes()
    record: dict[str, Any] = {
        "parameters": sum(info.elements for info in infos.values()),
        "models": 4,
        "limit_bytes": LIMIT,
        "merges": {},
    }
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        paths = make(Path(scratch))
        for method in ("linear", "ties"):
            out = Path(scratch) / "merged"
            began = time.perf_counter()
            found = run(method, paths, out)
            assert infos_of(Weights.open(out)) == infos
            shutil.rmtree(out)
            found["own_bytes"] = found["peak_bytes"] - found["imports_bytes"]
            record["merges"][method] = found
            print(
                f"{method:<7} {found['own_bytes'] / 2**20:.0f} MiB beside imports "
                f"({found['imports_bytes'] / 2**20:.0f} MiB), {time.perf_counter() - began:.0f} s, "
                f"under a {found['limit']} of {LIMIT / 1e9} GB"
            )
    OUT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
