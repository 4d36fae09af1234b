"""From what settings name to models that run: folders, adapters and deltas, with weights shared wherever they can be.

    a module, or a folder of weights     itself; named twice it is loaded once
    a PEFT adapter                       layers beside those of the term it stands on; they are switched on and off.
                                         With no such term, on the base that its config names
    a delta                              the places that it changes, written into the weights of the term it stands on
                                         before its turn and taken out after it, bit for bit

So a tuned model that is an adapter or a sparse delta takes the memory of one model and of what changed. Of a tensor
that changed by more than a third the tuned copy is kept whole. Writing a delta in and out costs a pass over what it
changes at every step; where that is dearer than memory, apply it once (`luthier delta apply`) and name the outcome.

Each term says which parameters it changes, so that the blocks below them run once for all (`luthier.decode.sharing`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from luthier.decode.base import Decoder, Term
from luthier.decode.mixture import Mixture, Opened
from luthier.decode.streams import inner
from luthier.decode.vocabulary import shared_vocabulary
from luthier.errors import InputError
from luthier.models import ModelSettings, load
from luthier.models.checkpoint import read_json
from luthier.models.tokens import tokenizer_in
from luthier.weights import Delta
from luthier.weights.hashing import tensor_hash
from luthier.weights.info import dtype_of, some

DENSE = 1 / 3  # share of a tensor's entries from which on it is kept whole: a place and two values are three numbers


def open_decoder(
    decoder: Decoder, tokenizers: Mapping[str, Any] | None = None, *, dtype: str = "auto", device: str = "cpu"
) -> Mixture:
    """The decoder with its models loaded, as one model; its lead tokenizer is `mixture.lead.tokenizer`.

    Args:
        tokenizers: of terms that are modules, by term.
        dtype: of models that are loaded (`ModelSettings.dtype`).
        device: of models that are loaded.

    Raises `InputError` for what cannot be loaded, and for models of different vocabularies.
    """
    opened = open_terms(decoder.terms(), tokenizers or {}, dtype=dtype, device=device)
    return Mixture(decoder, opened, shared_vocabulary(opened))


def open_terms(
    terms: Mapping[str, Term], tokenizers: Mapping[str, Any], *, dtype: str = "auto", device: str = "cpu"
) -> dict[str, Opened]:
    """A model for each term."""
    found: dict[str, Opened] = {}
    known: dict[str, str] = {}  # folder: the term that named it first
    for name, term in terms.items():
        if isinstance(term.model, nn.Module):
            changed = None if hasattr(term.model, "get_base_model") else frozenset[str]()
            found[name] = Opened(term.model.eval(), tokenizer=tokenizers.get(name), changed=changed)
            continue
        if not isinstance(term.model, str | Path):
            raise InputError(f"expected a folder or a model, got {type(term.model).__name__}", where=name)
        where = str(term.model)
        if where in known:
            found[name] = found[known[where]]
        else:
            found[name] = _opened(name, term, where, found, dtype, device)
            known[where] = name
    return found


def _opened(name: str, term: Term, where: str, found: dict[str, Opened], dtype: str, device: str) -> Opened:
    path = Path(where)
    adapter, delta = (path / "adapter_config.json").is_file(), (path / "delta.json").is_file()
    if not adapter and not delta:
        loaded = load(ModelSettings(base=where, dtype=dtype))  # type: ignore[arg-type]
        return Opened(loaded.model.to(device), tokenizer=loaded.tokenizer, changed=frozenset())
    if term.on is None or term.on not in found:
        if adapter:
            return _on_its_own_base(name, path, dtype, device)
        raise InputError(f"{name} is a delta, and no other model is named for it to stand on", where=where)
    if adapter:
        return _on_adapter(name, where, term.on, found)
    base, given = found[term.on], Delta.open(path)
    active = _nested(base.active, Entries(base.model, given, where).inside)
    changed = None if base.changed is None else base.changed | given.tensors.keys()
    return replace(base, active=active, variant=f"{base.variant}+{where}", changed=changed)


def _on_its_own_base(name: str, adapter: Path, dtype: str, device: str) -> Opened:
    """An adapter on the base that its config names, with the tokenizer beside it, if it has one."""
    from peft import PeftModel

    base = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        what = f"{name} is an adapter, and neither its config nor a decoder names a model for it to stand on"
        raise InputError(what, where=str(adapter))
    loaded = load(ModelSettings(base=base, dtype=dtype))  # type: ignore[arg-type]
    model = PeftModel.from_pretrained(loaded.model, str(adapter)).to(device)
    own = (adapter / "tokenizer_config.json").is_file()
    tokenizer = tokenizer_in(adapter, ModelSettings(base=base), name=str(adapter)) if own else loaded.tokenizer
    return Opened(model.eval(), tokenizer=tokenizer)


def _on_adapter(name: str, where: str, on: str, found: dict[str, Opened]) -> Opened:
    """Put the adapter's layers into the model of the term `on`; they are off but where this term runs."""
    from peft import PeftConfig, PeftModel

    base = found[on]
    if isinstance(base.model, PeftModel):
        raise InputError(f"{on} has adapters already", where=where, fix="merge the adapters first")
    held = [*base.model.parameters(), *base.model.buffers()]
    beside = [one.model for one in found.values() if one.model is not base.model and inner(one.model) is base.model]
    wrapped: Any = beside[0] if beside else None
    if wrapped is None:
        wrapped = PeftModel.from_pretrained(base.model, where, adapter_name=name)
    else:
        kinds = {PeftConfig.from_pretrained(where).peft_type, *(one.peft_type for one in wrapped.peft_config.values())}
        if len(kinds) > 1:
            what = f"adapters of the kinds {' and '.join(sorted(kinds))} cannot stand on one model"
            raise InputError(what, where=where, fix="merge all but one, and name the outcomes")
        wrapped.load_adapter(where, adapter_name=name)
    wrapped.eval()
    old = {id(tensor) for tensor in held}
    now = [*base.model.named_parameters(), *base.model.named_buffers()]
    changed = None if base.changed is None else base.changed | {path for path, t in now if id(t) not in old}
    if wrapped.peft_config[name].is_prompt_learning:  # it is in the wrapper alone
        return Opened(wrapped, base.active, f"{base.variant}+{where}", base.tokenizer)
    wrapped.base_model.disable_adapter_layers()
    return Opened(
        wrapped, _nested(base.active, _switched_on(wrapped, name)), f"{base.variant}+{where}", base.tokenizer, changed
    )


def _switched_on(wrapped: Any, name: str) -> Callable[[], AbstractContextManager[Any]]:
    @contextmanager
    def on() -> Iterator[None]:
        if len(wrapped.peft_config) > 1:
            wrapped.set_adapter(name, inference_mode=True)
        wrapped.base_model.enable_adapter_layers()
        try:
            yield
        finally:
            wrapped.base_model.disable_adapter_layers()

    return on


def _nested(
    outer: Callable[[], AbstractContextManager[Any]], inner: Callable[[], AbstractContextManager[Any]]
) -> Callable[[], AbstractContextManager[Any]]:
    if outer is nullcontext:
        return inner

    @contextmanager
    def both() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(outer())
            stack.enter_context(inner())
            yield

    return both


class Entries:
    """What a delta changes in a model that runs: places with both values, or whole tensors.

    The model may hold its weights in wider numbers than the base is stored in. Raises `InputError` if it is not the
    delta's base, or holds them in narrower numbers.
    """

    def __init__(self, model: nn.Module, delta: Delta, where: str):
        held = {_plain(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
        lost = sorted(set(delta.about["hashes"]) - held.keys())
        if lost:
            raise InputError(f"the model lacks {len(lost)} tensors of the delta ({some(lost)})", where=where)
        if delta.about["widened"]:
            what = "was tuned in wider numbers than its base has, and would be rounded to the base's"
            raise InputError(what, where=where, fix="apply it (luthier delta apply) and name the outcome")
        self.sparse: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # weight, places, tuned and base values
        self.whole: list[tuple[Tensor, Tensor]] = []  # weight, tuned
        for name in delta.tensors:
            weight = held[name].detach()
            stored = weight.cpu()
            asked = stored.to(dtype_of(delta.tensors[name]["dtype"]))  # a model may be held in wider numbers
            wider = torch.promote_types(asked.dtype, stored.dtype) == stored.dtype and torch.equal(
                asked.to(stored.dtype), stored
            )
            if not wider or tensor_hash(asked) != delta.about["hashes"][name][0]:
                what = f"{name} is not that of the base which the delta was made of"
                raise InputError(what, where=where, fix="name that base, in the numbers it is stored in or wider ones")
            tuned = delta.applied(name, asked).to(stored.dtype)
            places = (tuned != stored).view(-1).nonzero()[:, 0]
            if len(places) > DENSE * stored.numel() or _negative_zeros(stored, tuned):
                self.whole.append((weight, tuned.to(weight.device)))
                continue
            narrow = places.to(torch.int32 if stored.numel() < 2**31 else torch.int64)
            values = tuned.view(-1)[places], stored.reshape(-1)[places]
            self.sparse.append((weight, *(part.to(weight.device) for part in (narrow, *values))))

    @property
    def bytes(self) -> int:
        """Memory beside the model's own."""
        return sum(t.nbytes for _, *parts in self.sparse for t in parts) + sum(t.nbytes for _, t in self.whole)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """While open, the model is the tuned one."""
        with torch.no_grad():
            self._write(2)
            try:
                yield
            finally:
                self._write(3)

    def _write(self, side: int) -> None:
        for entry in self.sparse:
            entry[0].view(-1).index_copy_(0, entry[1].long(), entry[side])
        for weight, other in self.whole:
            now = weight.clone()
            weight.copy_(other)
            other.copy_(now)


def _plain(name: str) -> str:
    """The name that a weight had before an adapter was put beside it."""
    return name.replace(".base_layer", "").replace(".original_module", "")


def _negative_zeros(base: Tensor, tuned: Tensor) -> bool:
    """Whether a zero changed its sign: equal as numbers, not as bits."""
    zeros = (base == 0) & (tuned == 0)
    return bool((torch.signbit(base) != torch.signbit(tuned))[zeros].any())
