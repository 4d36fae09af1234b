"""The Copilot: a small decoder that reads what a language model (the Pilot) got wrong so far, and guesses what is next.

    errors      l_i = onehot(label i) - softmax(Pilot's logits i)            a vector over the vocabulary, sums to 0
    output      f_i, the guess at l_i, from  l_1 .. l_{i-1},  the Pilot's states at these tokens, and the prompt

    layer 1, 3, ..   norm, causal self-attention, norm, feed-forward         the input is (0, l_1, .., l_{i-1}) W
    layer 2, 4, ..   the same with cross-attention: queries from below, keys and values from Concat(X~, Pool(h))

X~ is the output of the Pilot's embedding over the prompt, Pool(h)_j the mean over the Pilot's layers of the state that
gave its prediction of token j. The prompt is visible as a whole. Of the states, token i sees those of tokens before it,
and with `include_current` also the one that gives prediction i itself. There are no token embeddings and no positions;
the head is the Copilot's own and starts at zero, so an untrained Copilot corrects nothing.

`forward` runs whole answers on errors that are known (training); `begin` and `step` go token by token on whatever
errors they are handed (generation) and keep keys and values: a step costs one token, not all before it.

`Copilot.of(pilot)` takes projections and norms from layers of the Pilot, spread evenly over its depth, where a layer
has the usual parts (q, k, v, o; gate, up, down) and the widths agree; else they are drawn at random. Copied attention
loses its rotation. Ours, where the paper leaves it open: Concat(X~, Pool(h)) passes one RMS norm before the keys, since
its two parts differ in scale; a linear map before that where the widths differ; at least two layers, since one alone
would not see the Pilot. Encoder-decoder Pilots are refused.

Zou et al., NeurIPS 2025 (arXiv 2505.16270). Trained by `luthier.train.copilot`, used by `luthier.decode.copilot`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from luthier.errors import InputError
from luthier.models.files import write_aside, write_sums
from luthier.models.regions import unwrapped
from luthier.models.structure import unwrap, walk
from luthier.models.topology import Topology

CONFIG, WEIGHTS = "copilot.json", "copilot.safetensors"
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class CopilotConfig(BaseModel):
    """What a Copilot is made of; stored beside its weights.

    Attributes:
        vocabulary: rows of the Pilot's head.
        pilot_width: size of the Pilot's hidden states.
        width: d_C, size of the Copilot's own states.
        layers: at least 2; every second one looks at the Pilot.
        heads, kv_heads, head_width: of attention; `kv_heads` divides `heads`.
        inner: size inside of the feed-forward parts.
        bias: whether queries, keys and values have one.
        include_current: whether the state that gave a prediction is seen when its error is guessed.
        pilot: what it was trained beside.
        scale: lambda, how much of f is added to the Pilot's probabilities unless the decoder says otherwise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocabulary: int = Field(ge=1)
    pilot_width: int = Field(ge=1)
    width: int = Field(ge=1)
    layers: int = Field(ge=2)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_width: int = Field(ge=1)
    inner: int = Field(ge=1)
    bias: bool = False
    epsilon: float = Field(default=1e-6, gt=0)
    include_current: bool = False
    pilot: str = ""
    scale: float = Field(default=0.3, ge=0, allow_inf_nan=False)


@dataclass
class Past:
    """What a Copilot has read of the rows that it writes along with.

    Attributes:
        visible: (rows, columns) bool, which columns of the prompt are there and not padding.
        keys, values: one for each layer, (rows, kv_heads, columns, head_width): of a self-attending layer those of its
            own tokens, of the others the prompt's and then the Pilot's states'.
    """

    visible: Tensor
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self.keys[layer] = torch.cat([self.keys[layer], keys], dim=2)
        self.values[layer] = torch.cat([self.values[layer], values], dim=2)


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and added to what came in."""

    def __init__(self, config: CopilotConfig):
        super().__init__()
        width, inner, head = config.width, config.inner, config.head_width
        self.heads, self.kv_heads, self.head_width = config.heads, config.kv_heads, head
        self.input_norm = nn.RMSNorm(width, config.epsilon)
        self.inner_norm = nn.RMSNorm(width, config.epsilon)
        self.q_proj = nn.Linear(width, config.heads * head, bias=config.bias)
        self.k_proj = nn.Linear(width, config.kv_heads * head, bias=config.bias)
        self.v_proj = nn.Linear(width, config.kv_heads * head, bias=config.bias)
        self.o_proj = nn.Linear(config.heads * head, width, bias=False)
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def remembered(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (rows, kv_heads, columns, head_width) of `source` (rows, columns, width)."""
        return self._split(self.k_proj(source), self.kv_heads), self._split(self.v_proj(source), self.kv_heads)

    def forward(self, hidden: Tensor, normed: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None) -> Tensor:
        """(rows, n, width). `normed` is `hidden` behind the first norm; `seen` (rows or 1, 1, n, columns) bool."""
        times = self.heads // self.kv_heads
        keys, values = keys.repeat_interleave(times, dim=1), values.repeat_interleave(times, dim=1)
        found = F.scaled_dot_product_attention(self._split(self.q_proj(normed), self.heads), keys, values, seen)
        hidden = hidden + self.o_proj(found.transpose(1, 2).flatten(2))
        inner = self.inner_norm(hidden)
        return hidden + self.down_proj(F.silu(self.gate_proj(inner)) * self.up_proj(inner))

    def _split(self, states: Tensor, heads: int) -> Tensor:
        return states.unflatten(-1, (heads, self.head_width)).transpose(1, 2)


class Copilot(nn.Module):
    """The module; float32. See the head of this file.

    Attributes:
        copied: how many of its layers are copies of the Pilot's.
    """

    def __init__(self, config: CopilotConfig):
        super().__init__()
        self.config, self.copied = config, 0
        width = config.width
        self.error_in = nn.Linear(config.vocabulary, width, bias=False)
        self.memory_in = nn.Linear(config.pilot_width, width, bias=False) if width != config.pilot_width else None
        self.memory_norm = nn.RMSNorm(width, config.epsilon)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.final_norm = nn.RMSNorm(width, config.epsilon)
        self.head = nn.Linear(width, config.vocabulary, bias=False)

    @classmethod
    def of(
        cls,
        pilot: nn.Module,
        *,
        layers: int | None = None,
        width: int | None = None,
        source: nn.Module | None = None,
        include_current: bool = False,
        seed: int = 0,
    ) -> Copilot:
        """A Copilot for `pilot`, on the processor; nothing is drawn from the global random state.

        Args:
            pilot: a causal language model, plain or wrapped.
            layers: as many as `source` has, if not given.
            width: that of `source`, if not given.
            source: whose layers are copied; `pilot` if not given.
            seed: of what is not copied.

        Raises `InputError` for an encoder-decoder Pilot, one without a head, and a width that heads do not divide.
        """
        theirs, base = unwrapped(pilot if source is None else source)[0], unwrapped(pilot)[0]
        config: Any = getattr(base, "config", None)
        if bool(getattr(config, "is_encoder_decoder", False)):
            raise InputError("a Copilot reads a causal language model, and this Pilot has an encoder", where="copilot")
        head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None  # type: ignore[operator]
        if head is None:
            raise InputError(f"{type(base).__name__} has no output embedding, so it makes no token errors")
        numbers, weight = _Numbers.of(theirs), unwrap(head).weight
        made = CopilotConfig(
            vocabulary=int(weight.shape[0]),  # type: ignore[index, arg-type]
            pilot_width=_Numbers.of(base).width,
            layers=max(2, numbers.layers if layers is None else layers),
            include_current=include_current,
            pilot=str(getattr(config, "_name_or_path", "") or ""),
            **numbers.at(width),
        )
        with torch.device("meta"):
            copilot = cls(made)
        copilot.to_empty(device="cpu")
        copilot._draw(torch.Generator().manual_seed(seed))
        copilot._copy(theirs)
        return copilot

    def forward(self, errors: Tensor, prompt: Tensor, visible: Tensor, states: Tensor) -> Tensor:
        """The guesses f_1 .. f_n, given the true errors; each sees those before it only.

        Args:
            errors: (rows, n, vocabulary) float32, l_1 .. l_n; shifted to the right here.
            prompt: (rows, columns, pilot_width), X~.
            visible: (rows, columns) bool, false for padding; at least one true in each row.
            states: (rows, n, pilot_width), Pool(h) of the states that gave predictions 1 .. n.

        Returns (rows, n, vocabulary) float32. Rows that end early are filled up on the right with anything.
        """
        rows, count, _ = errors.shape
        hidden = self.error_in(F.pad(errors, (0, 0, 1, 0))[:, :-1])
        memory = torch.cat([self._memory(prompt), self._memory(states)], dim=1)
        square = torch.ones(count, count, dtype=torch.bool, device=errors.device).tril()
        seen = square if self.config.include_current else square.tril(-1)
        across = torch.cat([visible[:, None].expand(-1, count, -1), seen.expand(rows, -1, -1)], dim=2)[:, None]
        for number, layer in enumerate(self.layers):
            normed = layer.input_norm(hidden)  # type: ignore[operator]
            own = _attends_itself(number)
            keys, values = layer.remembered(normed if own else memory)  # type: ignore[operator]
            hidden = layer(hidden, normed, keys, values, square[None, None] if own else across)
        return self.head(self.final_norm(hidden))

    def begin(self, prompt: Tensor, visible: Tensor) -> Past:
        """What `step` goes on from: (rows, columns, pilot_width) and (rows, columns) bool, padding on either side."""
        past, memory = Past(visible), self._memory(prompt)
        for number, layer in enumerate(self.layers):
            keys, values = layer.remembered(memory)  # type: ignore[operator]
            none = _attends_itself(number)
            past.keys.append(keys[:, :, :0] if none else keys)
            past.values.append(values[:, :, :0] if none else values)
        return past

    def step(self, error: Tensor | None, state: Tensor, past: Past) -> Tensor:
        """The next guess (rows, vocabulary); `past` grows by one token.

        Args:
            error: (rows, vocabulary), of the token before, true or guessed; None for the first token.
            state: (rows, pilot_width), Pool(h) of the state that gives this token's prediction.
        """
        if error is None:
            error = state.new_zeros(len(state), self.config.vocabulary)
        hidden, memory = self.error_in(error[:, None]), self._memory(state[:, None])
        for number, layer in enumerate(self.layers):
            normed = layer.input_norm(hidden)  # type: ignore[operator]
            own = _attends_itself(number)
            keys, values = layer.remembered(normed if own else memory)  # type: ignore[operator]
            if own or self.config.include_current:
                past.append(number, keys, values)
            seen = None
            if not own:
                rest = past.keys[number].shape[2] - past.visible.shape[1]
                seen = F.pad(past.visible, (0, rest), value=True)[:, None, None]
            hidden = layer(hidden, normed, past.keys[number], past.values[number], seen)
            if not (own or self.config.include_current):
                past.append(number, keys, values)
        return self.head(self.final_norm(hidden))[:, 0]

    def save(self, directory: Path | str) -> dict[str, str]:
        """Write `copilot.json` and `copilot.safetensors` into a folder, replaced as a whole; returns its digests."""
        directory = Path(directory)
        if directory.is_dir() and any(directory.iterdir()) and not (directory / CONFIG).exists():
            raise InputError("this folder holds other files and would be replaced", where=str(directory))
        with write_aside(directory) as aside:
            (aside / CONFIG).write_text(self.config.model_dump_json(indent=2) + "\n", encoding="utf-8")
            save_file({k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}, aside / WEIGHTS)
            return write_sums(aside)

    @classmethod
    def load(cls, directory: Path | str) -> Copilot:
        """The Copilot that `save` wrote, in evaluation mode; `InputError` if there is none or a file is damaged."""
        directory = Path(directory)
        if not (directory / CONFIG).is_file() or not (directory / WEIGHTS).is_file():
            raise InputError(f"there is no Copilot ({CONFIG} and {WEIGHTS})", where=str(directory))
        try:
            config = CopilotConfig.model_validate(json.loads((directory / CONFIG).read_text(encoding="utf-8")))
            weights = load_file(directory / WEIGHTS)
            with torch.device("meta"):
                copilot = cls(config)
            copilot.load_state_dict(weights, assign=True)
        except (ValidationError, ValueError, RuntimeError, SafetensorError) as error:
            raise InputError("the Copilot's files are damaged or of another version", where=str(directory)) from error
        return copilot.eval()

    # Inside

    def _memory(self, source: Tensor) -> Tensor:
        """X~ or states, brought to the Copilot's width and scale."""
        source = source.float()
        return self.memory_norm(source if self.memory_in is None else self.memory_in(source))

    def _draw(self, generator: torch.Generator) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
            elif name == "head.weight":
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=self.config.width**-0.5 / 2, generator=generator)

    @torch.no_grad()
    def _copy(self, source: nn.Module) -> None:
        blocks = Topology.of(source).blocks
        spread = torch.linspace(0, len(blocks) - 1, len(self.layers)).round().int().tolist()
        for mine, number in zip(self.layers, spread, strict=True):
            theirs = dict(walk(source.get_submodule(blocks[number].path)))
            named = {path.rpartition(".")[2]: part for path, part in theirs.items()}
            weights = {f"{n}.weight": getattr(named.get(n), "weight", None) for n in _PROJECTIONS}
            own = dict(mine.named_parameters())
            if any(w is None or w.shape != own[n].shape for n, w in weights.items()):
                continue
            biases = {f"{n}.bias": getattr(named[n], "bias", None) for n in ("q_proj", "k_proj", "v_proj")}
            for name, value in {**weights, **biases}.items():
                if value is not None and name in own:
                    own[name].copy_(value)
            norms = [source.get_submodule(path) for path in blocks[number].norms]
            before = [n for n in norms if getattr(n, "weight", torch.empty(0)).shape == own["input_norm.weight"].shape]
            if len(before) == 2:
                for ours, norm in zip((mine.input_norm, mine.inner_norm), before, strict=True):
                    _copy_norm(ours, norm)  # type: ignore[arg-type]
            self.copied += 1


@dataclass(frozen=True)
class _Numbers:
    """The sizes that a Copilot shares with the model whose layers it copies."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    inner: int
    bias: bool
    epsilon: float

    @classmethod
    def of(cls, model: Any) -> _Numbers:
        config = model.config.get_text_config()
        width, heads = int(config.hidden_size), int(getattr(config, "num_attention_heads", None) or 1)
        blocks = Topology.of(model).blocks
        first = {path.rpartition(".")[2]: part for path, part in walk(model.get_submodule(blocks[0].path))}
        return cls(
            layers=len(blocks),
            width=width,
            heads=heads,
            kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            head_width=int(getattr(config, "head_dim", None) or max(1, width // heads)),
            inner=int(_plain(getattr(config, "intermediate_size", None)) or 4 * width),
            bias=getattr(first.get("q_proj"), "bias", None) is not None,
            epsilon=float(getattr(config, "rms_norm_eps", None) or 1e-6),
        )

    def at(self, width: int | None) -> dict[str, Any]:
        """As keys of a config, at another width if given: heads of like size, feed-forward of like ratio."""
        if width is None or width == self.width:
            same = ("width", "heads", "kv_heads", "head_width", "inner", "bias", "epsilon")
            return {name: getattr(self, name) for name in same}
        heads = max(1, round(width * self.heads / self.width))
        if width % heads:
            raise InputError(f"a width of {width} cannot be split into {heads} heads", where="copilot.width")
        size, inner = width // heads, max(1, self.inner * width // self.width)
        return {"width": width, "heads": heads, "kv_heads": heads, "head_width": size, "inner": inner}


def _plain(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _attends_itself(number: int) -> bool:
    """Layers are counted from 1 in the paper: the odd ones attend themselves, the even ones the Pilot."""
    return number % 2 == 0


def _copy_norm(ours: nn.RMSNorm, theirs: nn.Module) -> None:
    """Take over a norm's weights if it then does the same: some add 1 to them, some subtract a mean."""
    kept = ours.weight.clone()
    ours.weight.copy_(theirs.weight)  # type: ignore[arg-type]
    probe = torch.randn(4, kept.shape[0], generator=torch.Generator().manual_seed(0))
    said = theirs(probe.to(theirs.weight.device, theirs.weight.dtype)).float().cpu()  # type: ignore[union-attr, arg-type]
    if not torch.allclose(ours(probe), said, rtol=1e-2, atol=1e-2):
        ours.weight.copy_(kept)
