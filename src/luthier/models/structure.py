"""What a module is, judged by its structure: linear, norm, embedding, attention, experts, router.

There is no table of architectures here. A module is judged by what it holds:

    linear      it maps `in_features` to `out_features` (or, GPT-2's Conv1D, `nx` to `nf`)
    norm        a leaf whose class is called a norm, or a leaf with nothing but vectors
    embedding   it has `num_embeddings` rows of `embedding_dim`
    attention   it knows how many heads it splits into: an integer attribute such as `num_heads` or `head_dim`, and
                matrices below it. Where no part of a block has one, a child called attention or attn is taken.
    block       it holds attention and, outside that attention, at least one more linear or a stack of experts
    experts     a list of modules of one class, or parameters of three dimensions (transformers 5 fuses all experts
                of a block into such), next to a router
    router      a part beside the experts whose matrices have as many rows as there are experts (or one row: the gate
                of a shared expert)

PEFT and similar tools put a wrapper where a module was and keep the module inside, as `base_layer` or
`original_module`. All functions here look through such wrappers, so a wrapped model has the structure of its base.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

_CALLED_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_WRAPPED = ("base_layer", "original_module")


def unwrap(module: nn.Module) -> nn.Module:
    """The module below PEFT's layer wrappers; the module itself if it is not wrapped."""
    while True:
        inner = next((module._modules[name] for name in _WRAPPED if module._modules.get(name) is not None), None)
        if inner is None:
            return module
        module = inner


def children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules right below `module`, seen through wrappers; a module that stands in two places comes twice."""
    for name, child in unwrap(module)._modules.items():
        if child is not None:
            yield name, unwrap(child)


def walk(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """`module` and everything below it with its path, parents first."""
    module = unwrap(module)
    yield path, module
    for name, child in children(module):
        yield from walk(child, join(path, name))


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def within(path: str, roots: tuple[str, ...] | list[str]) -> bool:
    """Whether `path` is one of `roots` or lies below one."""
    return any(path == root or path.startswith(root + ".") for root in roots)


def own_parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in module._parameters.items() if value is not None}


def matrices(module: nn.Module) -> int:
    """How many parameters of two or more dimensions `module` and all below it hold."""
    return sum(value.ndim >= 2 for _, part in walk(module) for value in own_parameters(part).values())


def has_parameters(module: nn.Module) -> bool:
    return any(own_parameters(part) for _, part in walk(module))


def is_linear(module: nn.Module) -> bool:
    features = hasattr(module, "in_features") and hasattr(module, "out_features")
    return features or (hasattr(module, "nf") and hasattr(module, "nx"))


def is_embedding(module: nn.Module) -> bool:
    return hasattr(module, "num_embeddings") and hasattr(module, "embedding_dim")


def is_convolution(module: nn.Module) -> bool:
    return hasattr(module, "kernel_size") and hasattr(module, "in_channels")


def is_norm(module: nn.Module) -> bool:
    own = own_parameters(module)
    if not own or any(True for _ in children(module)) or is_linear(module):
        return False
    if "norm" in type(module).__name__.lower():
        return True
    return (
        "weight" in own and set(own) <= {"weight", "bias"} and all(v.ndim == 1 and v.numel() > 1 for v in own.values())
    )


def is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.ModuleDict)


def linears_in(module: nn.Module, path: str = "") -> list[str]:
    return [name for name, part in walk(module, path) if is_linear(part)]


def splits_heads(module: nn.Module) -> bool:
    """Whether `module` knows a number of heads and holds matrices to split among them."""
    counts = any(type(value) is int and "head" in name for name, value in vars(module).items())
    return counts and matrices(module) > 0


def attention_in(block: nn.Module, path: str = "", named: str | None = None) -> list[str]:
    """Paths of the attention parts of `block`, each the largest part that is attention and nothing else.

    `named` overrides the judgement: the parts whose path inside the block is, or ends with, that name.
    """
    if named is not None:
        inside = [name for name, _ in walk(block) if name == named or name.endswith("." + named)]
        return [join(path, name) for name in inside]
    found = _attention_by(block, path, lambda name, part: splits_heads(part))
    return found or _attention_by(block, path, lambda name, part: _is_called_attention(name, part))


def _is_called_attention(name: str, module: nn.Module) -> bool:
    return bool(_CALLED_ATTENTION.search(name) or _CALLED_ATTENTION.search(type(module).__name__))


def _attention_by(block: nn.Module, path: str, sign: Callable[[str, nn.Module], bool]) -> list[str]:
    found: list[str] = []
    for name, child in children(block):
        here = join(path, name)
        parts = ((p.rpartition(".")[2] or name, part) for p, part in walk(child))
        if not matrices(child) or not any(sign(p, part) for p, part in parts):
            continue
        below = _attention_by(child, here, sign)
        if is_list(child):
            found += below or ([here] if sign(name, child) else [])
        elif below and not _is_called_attention(name, child) and _linears_outside(child, here, below):
            found += below  # a wrapper around both attention and feed-forward
        else:
            found.append(here)
    return found


def _linears_outside(module: nn.Module, path: str, roots: list[str]) -> bool:
    outside = (part for name, part in walk(module, path) if not within(name, roots))
    return any(is_linear(part) or _is_fused(part) for part in outside)


def is_block(module: nn.Module) -> bool:
    """Whether `module` holds attention and, outside it, a linear or fused experts."""
    roots = attention_in(module)
    return bool(roots) and _linears_outside(module, "", roots)


def _is_fused(module: nn.Module) -> bool:
    return not is_convolution(module) and any(value.ndim == 3 for value in own_parameters(module).values())


@dataclass(frozen=True)
class Experts:
    """The experts of one block.

    Attributes:
        modules: paths of the experts, one each, or of the one module that holds all of them fused.
        parameters: names of the fused parameters (first dimension: expert); empty if the experts are modules.
        routers: paths of the parts that choose among them.
        count: how many experts there are.
    """

    modules: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    routers: tuple[str, ...] = ()
    count: int = 0


def experts_in(block: nn.Module, path: str, attention: list[str]) -> Experts:
    """The experts of `block` outside its `attention`, and what routes to them; empty if there are none."""
    modules: list[str] = []
    parameters: list[str] = []
    routers: list[str] = []
    count = 0
    for here, part in walk(block, path):
        if here == path or within(here, attention) or within(here, modules):
            continue
        size = _list_of_alike(part)
        fused = {name: v for name, v in own_parameters(part).items() if v.ndim == 3 and not is_convolution(part)}
        if not size and not fused:
            continue
        size = size or int(next(iter(fused.values())).shape[0])
        beside = [name for name in _routers_beside(block, path, here, size) if not within(name, attention)]
        if not beside and not (fused and "expert" in here.lower()):
            continue  # a chain of feed-forward parts, or some other tensor
        if fused:
            modules.append(here)
            parameters += [join(here, name) for name in own_parameters(part)]
        else:
            modules += [join(here, name) for name, item in children(part) if linears_in(item)]
        routers += [router for router in beside if router not in routers]
        count = max(count, size)
    return Experts(tuple(modules), tuple(parameters), tuple(routers), count)


def _list_of_alike(module: nn.Module) -> int:
    """How many modules `module` lists if all are of one class and hold linears; else 0."""
    if not is_list(module):
        return 0
    items = [child for _, child in children(module) if matrices(child)]
    alike = len(items) > 1 and len({type(item) for item in items}) == 1 and all(linears_in(item) for item in items)
    return len(items) if alike else 0


def _routers_beside(block: nn.Module, path: str, experts: str, count: int) -> list[str]:
    """Parts whose matrices all have `count` rows (or one) beside `experts`, or beside a parent of it."""
    parts = dict(walk(block, path))
    parent = experts
    while parent != path:
        parent = parent.rpartition(".")[0]
        found: list[str] = []
        sizes: set[int] = set()
        for name, child in children(parts[parent]):
            here = join(parent, name)
            shapes = [v.shape for _, p in walk(child) for v in own_parameters(p).values() if v.ndim >= 2]
            rows = {int(shape[0]) if len(shape) == 2 else 0 for shape in shapes}
            if rows and rows <= {count, 1} and not within(experts, [here]):
                found.append(here)
                sizes |= rows
        if count in sizes:
            return found
    return []
