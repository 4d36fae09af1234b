"""The plan's memory is a bound of what a merge takes, and no more than three times that."""

import json
import shutil
import subprocess
import sys

import pytest

MAKE = """
import sys
from pathlib import Path
import torch
from luthier.weights import write_weights
from luthier.weights.info import Info

dtype = getattr(torch, sys.argv[2])
shapes = {"model.embed_tokens.weight": (32_000, 768)}
for layer in range(12):
    for name, shape in {"q": (768, 768), "o": (768, 768), "up": (3072, 768), "down": (768, 3072)}.items():
        shapes[f"model.layers.{layer}.{name}.weight"] = shape
infos = {name: Info("BF16" if dtype.itemsize == 2 else "F32", shape) for name, shape in shapes.items()}
block = torch.randn(2**20, generator=torch.Generator().manual_seed(0)) / 50
for number in range(3):
    change = torch.randn(2**20, generator=torch.Generator().manual_seed(number)) / 1000
    values = (block + change if number else block).to(dtype)
    def read(name):
        for start in range(0, infos[name].elements, len(values)):
            yield values[: infos[name].elements - start]
    folder = Path(sys.argv[1]) / str(number)
    folder.mkdir()
    write_weights(folder, infos, read)
"""
# A merge of tiny models first, so that imports and compiled code count as the program.
CHILD = """
import json, sys, threading, time
from pathlib import Path
import torch
import luthier as lt
from safetensors.torch import save_file
from luthier.pipeline.merging import plan_merge, read_recipe

folder, method = Path(sys.argv[1]), sys.argv[2]
based = method not in ("linear", "slerp")
weights = torch.randn(64, 32, dtype=getattr(torch, sys.argv[3]))
for number in range(3):
    (folder / f"tiny-{number}").mkdir(exist_ok=True)
    save_file({"a.weight": weights + number / 100}, folder / f"tiny-{number}" / "model.safetensors")

def merged(kind, out):
    given = {"models": [str(folder / f"{kind}{n}") for n in (1, 2)]}
    given |= {"base": str(folder / f"{kind}0")} if based else {}
    lt.merge(method, out=folder / out, **given)
    return plan_merge(read_recipe({"method": method} | given), None)["memory_bytes"]

def own():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

merged("tiny-", f"{method}-tiny")
start, peak, running = own(), 0, True

def watch():
    global peak
    while running:
        peak = max(peak, own())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
plan = merged("", f"{method}-whole")
running = False
watcher.join()
print(json.dumps({"plan": plan, "took": peak - start}))
"""


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def models(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    subprocess.run([sys.executable, "-c", MAKE, str(folder), request.param], check=True)
    yield folder, request.param
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("method", ["linear", "task-arithmetic", "ties", "slerp"])
def test_the_plan_bounds_what_a_merge_takes(models, method):
    folder, kind = models
    words = [sys.executable, "-c", CHILD, str(folder), method, kind]
    found = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert found["took"] <= found["plan"] <= 3 * found["took"], found
