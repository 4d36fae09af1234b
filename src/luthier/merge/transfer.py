"""Fine-tuning transfer: give a new base the tuning of an old one, without training.

    theta = m_t + scale (m'_s - m_s)          m_t the new base, m_s the old one (`source_base`), m'_s the old one tuned

If both bases lie in one valley of the loss, the step that tuned the old one is nearly the step that would tune the new
one. So the tuning of an old release is recycled on a new one, or a new tuning is ported back to an old base; and it is
a better start for further tuning than the bare base (`luthier.pipeline.recycle`).

Tuning often adds tokens. `vocab: pad` gives both bases rows of zeros up to the tuned model's number, so the added
tokens get the tuned rows times `scale`; `strict` refuses. A base with more rows than the tuned model is refused in
both. Config and tokenizer are the tuned model's, but for what belongs to the target's positions (rope, context): those
are properties of the weights that receive, and findings name each that was kept. Tokens that carry another number in
the target than in the tuned model are told, and beyond one in a hundred refused: then it is another tokenizer.

Differences to the authors' script: float32 throughout and one rounding to the target's type (theirs adds into bf16,
where small changes vanish); the target's position settings stay. `include` and `exclude` (ours) choose tensors by name;
all others stay the target's.

When not to use it: between bases far apart in training (`luthier.merge.valley` measures that), or that do not know the
task at all: the paper finds that recycling then hurts. Between bases of different seeds nothing is transferred. A LoRA
adapter is transferred by naming it as the model: it stands on the new base as it is.

Lin et al. 2025, "Efficient Model Development through Fine-tuning Transfer" (EMNLP). mergekit's `linear` with weights
1, 1, -1 (target, tuned, source base) is the same arithmetic.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import field_serializer, field_validator

from luthier.errors import InputError
from luthier.findings import Finding
from luthier.merge.base import Merge, Merged, Shape, Tile
from luthier.merge.derived_sources import AdapterSource, AgainstSource, PaddedSource
from luthier.merge.knobs import knob, meets, value_of
from luthier.merge.lineup import Lineup
from luthier.merge.sources import Source, config_of, open_source
from luthier.merge.vocabulary import tokens_of
from luthier.models.checkpoint import read_json
from luthier.weights.algebra import moved
from luthier.weights.info import some

# In config.json. The last two are no positions, but what the written tensors are.
FROM_TARGET = (
    "max_position_embeddings",
    "original_max_position_embeddings",
    "n_positions",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "partial_rotary_factor",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "dtype",
    "torch_dtype",
)
ALIKE = 0.01  # share of tokens that may carry another number in another release of one tokenizer


class Transfer(Merge):
    """Add to a new base what tuning changed in an old one."""

    method: Literal["transfer"] = "transfer"
    paper: ClassVar[int | None] = 39
    models_allowed: ClassVar[tuple[int, int | None]] = (1, 1)
    own_vocabulary: ClassVar[bool] = True
    source_base: Any
    scale: knob() = 1.0  # type: ignore[valid-type]
    vocab: Literal["pad", "strict"] = "pad"
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None

    @field_validator("source_base")
    @classmethod
    def _something(cls, given: Any) -> Any:
        if given is None:
            raise ValueError("expected the model that the tuned one was made from")
        return str(given) if isinstance(given, Path) else given

    @field_serializer("source_base")
    def _told(self, given: Any) -> str:
        return given if isinstance(given, str) else getattr(given, "label", "tensors in memory")

    def arrange(self, base: Source | None, models: Sequence[Source]) -> tuple[Source | None, list[Source]]:
        """The target and the tuned model, as wide as the latter and with its folder; its difference is that to
        `source_base`."""
        if base is None or len(models) != 1:
            return base, list(models)
        tuned = models[0]
        source = open_source(self.source_base, None, label=None if isinstance(self.source_base, str) else "source_base")
        for other in (source, base):
            check_kin(other, tuned)
        folder = tuned.folder or base.folder
        padded = [PaddedSource(s, padding(s, tuned, self.vocab), folder) for s in (source, base)]
        Lineup(padded[0], [tuned])  # refuses what does not fit
        return padded[1], [tuned if isinstance(tuned, AdapterSource) else AgainstSource(tuned, padded[0])]

    def check(self, shape: Shape) -> None:
        for name in shape.names:
            value_of(self.scale, name, shape.depth_of(name))
        for kind, patterns in (("include", self.include), ("exclude", self.exclude)):
            idle = [p for p in patterns or () if not any(meets(p, name) for name in shape.names)]
            if idle:
                raise InputError(f"no tensor's name is met by {', '.join(map(repr, idle))}", where=kind)

    def combine(self, tile: Tile, found: Any) -> Merged:
        if not self._moves(tile.name):
            return Merged(tile.base, torch.zeros_like(tile.models))
        return Merged(moved(tile.base, tile.at(self.scale) * tile.deltas[0]), tile.deltas)

    def amend(self, lineup: Lineup, folder: Path) -> None:
        """Give the copied config of the tuned model the target's position settings."""
        target = self._target(lineup)
        kept = from_target(config_of(target), config_of(lineup.models[0]))
        if kept:
            path = folder / "config.json"
            config = read_json(path)
            for place, (value, _) in kept.items():
                section, key = _section(config, place)
                if value is None:
                    section.pop(key, None)
                else:
                    section[key] = value
            path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def noticed(self, lineup: Lineup) -> list[Finding]:
        if not isinstance(lineup.base, PaddedSource):
            return []
        found, target, tuned = [], self._target(lineup), lineup.models[0]
        if lineup.base.padded:
            added = {n: rows - target.infos[n].shape[0] for n, rows in lineup.base.padded.items()}
            text = f"{max(added.values())} rows are new to the target and are the tuned model's own ({some(added)})"
            found.append(Finding(level="info", code="merge.padded", message=text, value=added))
        kept = from_target(config_of(target), config_of(tuned))
        if kept:
            told = "; ".join(f"{key} {ours!r}, not {theirs!r}" for key, (ours, theirs) in kept.items())
            text = f"the config is the tuned model's, but for what is the target's: {told}"
            found.append(Finding(level="info", code="merge.positions", message=text))
        renumbered = moved_tokens(target, tuned)
        if renumbered:
            text = f"{len(renumbered)} tokens have another number in the target ({some(renumbered)})"
            found.append(Finding(level="warn", code="merge.tokens", message=text, value=len(renumbered)))
        return found

    def _target(self, lineup: Lineup) -> Source:
        assert isinstance(lineup.base, PaddedSource)
        return lineup.base.inner

    def _moves(self, name: str) -> bool:
        wanted = self.include is None or any(meets(pattern, name) for pattern in self.include)
        return wanted and not any(meets(pattern, name) for pattern in self.exclude or ())


def padding(source: Source, tuned: Source, vocab: Literal["pad", "strict"]) -> dict[str, int]:
    """Rows that the vocabulary tensors of `source` need, to be as many as those of `tuned`; empty if they are.

    Vocabulary tensors are those that differ in the number of rows alone, all from the same number to the same (by the
    tuned model's config, if there is one, to its `vocab_size`), at least one a matrix. Anything else that differs is
    left for the lineup to refuse. Raises `InputError` if `source` has more rows, or `vocab` is strict.
    """
    both = {n: (i.shape, tuned.infos[n].shape) for n, i in source.infos.items() if n in tuned.infos}
    differ = {name: pair for name, pair in both.items() if pair[0] != pair[1]}
    rows = {(a[:1], b[:1]) for a, b in differ.values()}
    alike = all(a[1:] == b[1:] and len(a) in (1, 2) for a, b in differ.values())
    if len(rows) != 1 or not alike or all(len(a) == 1 for a, _ in differ.values()):
        return {}
    ((here,), (wanted,)) = rows.pop()
    size = config_of(tuned).get("vocab_size", wanted)
    if size != wanted:
        return {}
    if here > wanted or vocab == "strict":
        raise InputError(
            f"{some(differ)} has {here} rows of vocabulary, the tuned model {wanted}",
            where=source.label,
            fix="vocab: pad gives it rows of zeros"
            if here < wanted
            else "only a tuned model with as many can be moved",
        )
    return dict.fromkeys(differ, wanted)


def check_kin(source: Source, tuned: Source) -> None:
    """`InputError` if two models are of different kinds, one is quantised, or they use another tokenizer."""
    ours, theirs = config_of(source), config_of(tuned)
    for one, label in ((ours, source.label), (theirs, tuned.label)):
        if one.get("quantization_config"):
            raise InputError("is quantised", where=label, fix="dequantise it first")
    for key, what in (("model_type", "is of another architecture"), ("tie_word_embeddings", "ties its embeddings")):
        if key in ours and key in theirs and ours[key] != theirs[key]:
            raise InputError(f"{what}: {key} is {ours[key]!r}, of {tuned.label} {theirs[key]!r}", where=source.label)
    renumbered = moved_tokens(source, tuned)
    if len(renumbered) > ALIKE * max(1, len(tokens_of(tuned.folder) or ())):
        what = f"{len(renumbered)} tokens have another number than in {tuned.label} ({some(renumbered)})"
        raise InputError(what, where=source.label, fix="only models with one tokenizer can take over a tuning")


def moved_tokens(source: Source, tuned: Source) -> list[str]:
    """Tokens of both tokenizers whose number differs; empty where one has no `tokenizer.json`."""
    ours, theirs = tokens_of(source.folder), tokens_of(tuned.folder)
    if ours is None or theirs is None:
        return []
    return [token for token, number in ours.items() if theirs.get(token, number) != number]


def from_target(target: Mapping[str, Any], tuned: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys of a config that stay the target's, with its value and the tuned model's, where they differ.

    A key inside `text_config` is written `text_config.key`; None stands for a key that is not there.
    """
    if not target or not tuned:
        return {}
    found = {key: (target.get(key), tuned.get(key)) for key in FROM_TARGET}
    if isinstance(target.get("text_config"), Mapping) and isinstance(tuned.get("text_config"), Mapping):
        inner = from_target(target["text_config"], tuned["text_config"])
        found |= {f"text_config.{key}": pair for key, pair in inner.items()}
    return {key: pair for key, pair in found.items() if pair[0] != pair[1]}


def _section(config: dict[str, Any], place: str) -> tuple[dict[str, Any], str]:
    """The part of a config and the key in it that `place` names."""
    *path, key = place.split(".")
    for name in path:
        config = config[name]
    return config, key
