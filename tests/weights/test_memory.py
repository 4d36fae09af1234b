"""Memory: a delta is made, applied and removed in pieces, whatever the size of the model or of its largest tensor."""

import json
import subprocess
import sys

import pytest

LIMIT = 64 * 2**20  # bytes of its own that a process may take beside its imports, for weights of 8 times that

CHILD = """
import json, sys, threading, time
from pathlib import Path
import torch
from luthier.weights import Delta, content_hash, diff, write_weights, Weights
from luthier.weights.info import Info
import luthier.weights.adapter

torch.set_num_threads(1)
folder = Path(sys.argv[1])
infos = {"embed": Info("BF16", (100_000, 1_500))}
infos |= {f"layer.{n}": Info("BF16", (1_000, 10_000)) for n in range(11)}
block = (torch.randn(2**20, generator=torch.Generator().manual_seed(0)) / 50).bfloat16()

def tuned_block(number):
    moved = block.clone()
    moved[number % 7 :: 9 if number % 2 else 200] *= 1.01
    return moved

def write(name, tuned):
    def read(tensor):
        for number, start in enumerate(range(0, infos[tensor].elements, len(block))):
            part = tuned_block(number) if tuned else block
            yield part[: infos[tensor].elements - start]
    (folder / name).mkdir()
    write_weights(folder / name, infos, read, shard_bytes=10**8)

def own():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

write("base", False)
write("tuned", True)
start, peak, running = own(), 0, True

def watch():
    global peak
    while running:
        peak = max(peak, own())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
delta = diff(folder / "base", folder / "tuned", folder / "delta")
delta.apply(folder / "base", folder / "again")
delta.remove(folder / "again", folder / "back")
running = False
watcher.join()
same = delta.about["tuned"] == content_hash(Weights.open(folder / "again"))
same = same and delta.about["base"] == content_hash(Weights.open(folder / "back"))
print(json.dumps({"peak": peak - start, "bytes": sum(info.bytes for info in infos.values()), "same": same}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_model(tmp_path):
    done = subprocess.run([sys.executable, "-c", CHILD, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["same"] and found["bytes"] > 7.5 * LIMIT and 0 < found["peak"] < LIMIT, found
