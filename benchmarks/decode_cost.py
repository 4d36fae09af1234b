"""What mixing costs: time against the models apart, writing ahead against token by token, an adapter's share, memory.

    python benchmarks/decode_cost.py                   all four, three repeats; about six minutes
    python benchmarks/decode_cost.py mixture --repeats 1

mixture    three models of SmolLM2-135M's shape (random weights, float32) answer four prompts: seconds of `eft` against
           the sum of the seconds that transformers' own generation takes with each model alone.
ahead      a large base, and a tuned pair that costs a fifth of it or less and mostly agrees with it (the large model is
           the small one with blocks on top that add little): `speculative: 4` against 0, one prompt, sampled.
adapter    a base of SmolLM2-135M's shape and a LoRA on its upper half under `eft`: seconds with the lower half run once
           for both against seconds with each run whole.
memory     a base with a sparse delta on it (5% of the linears' entries, as LIFT leaves them) against the base alone:
           tensors held, and the peak of a process that generates.

Arms take turns; ratios are of medians. Writes benchmarks/results/decode_cost.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from shapes import SMOLLM2_135M

OUT = Path(__file__).parent / "results" / "decode_cost.json"
TARGETS = {"mixture": 1.1, "ahead": 1.5, "adapter": 0.85, "memory": 1.15}
SHAPE = {**SMOLLM2_135M, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NEW = 32


def make(seed: int, **changes: Any) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes})).eval()
    model.generation_config.eos_token_id = None  # all write the same number of tokens
    return model


def mixture_of(decoder: Any) -> Any:
    from luthier.decode import Mixture, Opened

    models = {name: Opened(term.model) for name, term in decoder.terms().items()}
    rows = {one.model.config.vocab_size for one in models.values()}
    return Mixture(decoder, models, min(rows))


class Silent:
    """A tokenizer of nothing, for answers that nobody reads."""

    pad_token_id = eos_token_id = 0
    chat_template = None

    def get_added_vocab(self) -> dict[str, int]:
        return {}

    def decode(self, ids: list[int], **_: Any) -> str:
        return ""


def seconds(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def mixture(repeats: int) -> dict[str, Any]:
    import torch

    from luthier.decode import Eft

    base, tuned, before = (make(seed) for seed in range(3))
    together = mixture_of(Eft(base=base, tuned=tuned, tuned_base=before))
    ids = torch.randint(3, 49152, (4, 64), generator=torch.Generator().manual_seed(0))
    how = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    runs: dict[str, list[float]] = {"apart": [], "together": []}
    for repeat in range(repeats + 1):  # the first one warms up
        apart = sum(seconds(lambda m=m: m.generate(ids, **how)) for m in (base, tuned, before))  # type: ignore[misc]
        both = seconds(lambda: together.generate(ids, **how))
        if repeat:
            runs["apart"].append(apart)
            runs["together"].append(both)
    return {"runs": runs, "ratio": median(runs["together"]) / median(runs["apart"])}


def ahead(repeats: int) -> dict[str, Any]:
    import torch

    from luthier.decode import Eft
    from luthier.decode.sampling import Sampler
    from luthier.decode.speculative import speculate

    small = {"vocab_size": 8192, "num_hidden_layers": 4, "initializer_range": 0.06}
    tuned, before = make(0, **small), make(0, **small)
    with torch.no_grad():
        for parameter in tuned.model.layers.parameters():
            parameter += 0.003 * torch.randn_like(parameter)
    base = make(1, **{**small, "num_hidden_layers": 30})
    base.load_state_dict(before.state_dict(), strict=False)
    with torch.no_grad():
        for layer in base.model.layers[4:]:  # blocks that add little: the pair agrees with the base
            layer.self_attn.o_proj.weight *= 0.03
            layer.mlp.down_proj.weight *= 0.03
    decoder = {"base": base, "tuned": tuned, "tuned_base": before}
    fast, plain = mixture_of(Eft(**decoder, speculative=4)), mixture_of(Eft(**decoder))
    prompt = torch.randint(3, 8192, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = dict.fromkeys(fast.terms, prompt)
    from luthier.decode import generate

    runs: dict[str, list[float]] = {"plain": [], "ahead": [], "draft": [], "base": []}
    kept = []
    for repeat in range(repeats + 1):
        how = {"max_new_tokens": 2 * NEW, "temperature": 1.0, "seed": repeat}
        arms = {
            "plain": seconds(lambda h=how: generate(plain, Silent(), [prompt], **h)),  # type: ignore[misc]
            "ahead": 0.0,
            "draft": seconds(lambda h=how: generate(tuned, Silent(), [prompt], **h)),  # type: ignore[misc]
            "base": seconds(lambda h=how: generate(base, Silent(), [prompt], **h)),  # type: ignore[misc]
        }
        began = time.perf_counter()
        written = speculate(
            fast,
            prompts,
            number=0,
            room=2 * NEW,
            sampler=Sampler(temperature=1.0, seed=repeat),
            ended=lambda ids: False,
        )
        arms["ahead"] = time.perf_counter() - began
        if repeat:
            kept.append(written.kept / written.drafted)
            for name, value in arms.items():
                runs[name].append(value)
    middle = {name: median(values) for name, values in runs.items()}
    return {
        "runs": runs,
        "kept": median(kept),
        "draft_cost": middle["draft"] / middle["base"],
        "ratio": middle["plain"] / middle["ahead"],
    }


def adapter(repeats: int) -> dict[str, Any]:
    import torch
    from peft import LoraConfig, get_peft_model

    from luthier.decode import Eft, generate, open_decoder
    from luthier.models import ModelSettings, load_tokenizer

    with tempfile.TemporaryDirectory() as scratch:
        folder, layers = Path(scratch), SHAPE["num_hidden_layers"]
        model = make(0)
        model.save_pretrained(folder / "base")
        load_tokenizer(ModelSettings(base="package:luthier/worlds/tiny-lm")).save_pretrained(folder / "base")
        linears = [f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")]
        upper = LoraConfig(r=8, target_modules=linears, layers_to_transform=list(range(layers // 2, layers)))
        get_peft_model(model, upper).save_pretrained(folder / "adapter")
        decoder = Eft(base=str(folder / "base"), tuned=str(folder / "adapter"), weight=1.5)
        once, apart = open_decoder(decoder), open_decoder(decoder)
    apart.shared = {}
    prompts = torch.randint(3, once.vocabulary, (4, 64), generator=torch.Generator().manual_seed(0)).tolist()
    runs: dict[str, list[float]] = {"once": [], "apart": []}
    for repeat in range(repeats + 1):
        for arm, mixed in (("once", once), ("apart", apart)):
            how = {"max_new_tokens": NEW, "stop_at_eos": False}
            time_taken = seconds(lambda m=mixed, h=how: generate(m, Silent(), prompts, **h))  # type: ignore[misc]
            if repeat:
                runs[arm].append(time_taken)
    blocks = once.shared["tuned"].count
    return {"runs": runs, "blocks": blocks, "of": layers, "ratio": median(runs["once"]) / median(runs["apart"])}


def memory(repeats: int) -> dict[str, Any]:
    import torch

    from luthier.models import ModelSettings, load_tokenizer
    from luthier.weights import diff

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = make(0)
        model.save_pretrained(folder / "base")
        load_tokenizer(ModelSettings(base="package:luthier/worlds/tiny-lm")).save_pretrained(folder / "base")
        with torch.no_grad():
            for layer in model.model.layers:
                for name, parameter in layer.named_parameters():
                    if "proj" in name:
                        parameter += 0.01 * (torch.rand_like(parameter) < 0.05)
        model.save_pretrained(folder / "tuned")
        diff(folder / "base", folder / "tuned", folder / "delta")
        runs: dict[str, list[dict[str, int]]] = {"one": [], "pair": []}
        for _ in range(repeats):
            for arm in runs:
                command = [sys.executable, __file__, "--measure", arm, str(folder)]
                environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
                done = subprocess.run(command, capture_output=True, text=True, env=environment)
                if done.returncode:
                    sys.exit(done.stderr[-2000:])
                runs[arm].append(json.loads(done.stdout.splitlines()[-1]))
    held, peak = ({arm: median(run[key] for run in of) for arm, of in runs.items()} for key in ("held", "peak"))
    return {"runs": runs, "ratio": held["pair"] / held["one"], "peak_ratio": peak["pair"] / peak["one"]}


def measure(arm: str, folder: Path) -> None:
    """In a process of its own: bytes of tensors that are held, and the peak of resident memory."""
    import torch

    from luthier.decode import Eft, Mixture, Single
    from luthier.decode.opening import open_terms

    base, delta = str(folder / "base"), str(folder / "delta")
    decoder: Any = Single(base=base) if arm == "one" else Eft(base=base, tuned=delta, weight=1.5)
    opened = open_terms(decoder.terms(), {})
    mixed = Mixture(decoder, opened, 49152)
    mixed.generate(torch.full((1, 32), 5), max_new_tokens=8, do_sample=False, pad_token_id=0)
    held = sum(p.nbytes for p in {id(p): p for p in mixed.parameters()}.values())
    entries = [cell.cell_contents for cell in _cells(opened["tuned"].active)] if arm == "pair" else []
    held += sum(one.bytes for one in entries if hasattr(one, "bytes"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"held": held, "peak": peak}))


def _cells(active: Any) -> list[Any]:
    """What a bound method or closure holds on to."""

    class Cell:
        def __init__(self, contents: Any):
            self.cell_contents = contents

    return [Cell(active.__self__)] if hasattr(active, "__self__") else list(active.__closure__ or ())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(TARGETS)}; default all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(arguments.measure[0], Path(arguments.measure[1]))
    import torch

    record: dict[str, Any] = {
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    }
    if arguments.out.is_file():
        record = json.loads(arguments.out.read_text(encoding="utf-8"))
    for case in arguments.cases or TARGETS:
        record[case] = {**globals()[case](arguments.repeats), "target": TARGETS[case]}
        shown = {key: round(value, 3) for key, value in record[case].items() if isinstance(value, float)}
        print(case, shown, flush=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
