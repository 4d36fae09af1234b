"""The tokenizer of a model, and making the two agree: padding, end of turn, rows of the embedding.

Padding. Batches need a pad token; many causal models have none. Then a token that was reserved and never used is
taken, else the end token (harmless: padding carries no attention and no loss). Which one is in `facts["pad"]`.

End of turn. A chat model ends its answer with the token that its template writes after an answer, which is not
always the tokenizer's `eos_token`; a tuned model that does not know it talks on for ever. So the template is asked:
the first special token it writes after an assistant's message joins the end tokens of the generation config.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from luthier.errors import InputError
from luthier.models.locate import locate
from luthier.models.quiet import first_line, quiet
from luthier.models.settings import ModelSettings

_PAD = re.compile(r"[<\[|]*(pad|finetune_right_pad(_id)?)[>\]|]*", re.IGNORECASE)
_RESERVED = re.compile(r"<\|?(reserved_special_token_\d+|reserved_\d+|unused\d+)\|?>|\[unused\d+\]", re.IGNORECASE)
_FILES = ("tokenizer.json", "tokenizer.model", "*.spm", "spiece.model", "sentencepiece*.model", "vocab.*", "*.tiktoken")
_ANSWER = "Nineteen larks sang"


def load_tokenizer(settings: ModelSettings, *, cache: Path | None = None) -> Any:
    """The tokenizer that `settings` name, with their chat template; `InputError` if there is none or it is broken."""
    place = locate(
        settings.tokenizer or settings.base,
        revision=None if settings.tokenizer else settings.revision,
        gguf_file=None if settings.tokenizer else settings.gguf_file,
        code=settings.trust_remote_code,
        weights=(settings.tokenizer or settings.base).endswith(".gguf"),
    )
    folder = place.folder
    if place.gguf_path is not None:
        from luthier.models.gguf import converted

        folder = converted(place.gguf_path, cache)
    return tokenizer_in(folder, settings, name=place.name)


def tokenizer_in(folder: Path, settings: ModelSettings, *, name: str) -> Any:
    """The tokenizer that `folder` holds. `name` is what the recipe calls the folder."""
    from transformers import AutoTokenizer

    none = "has no tokenizer (expected tokenizer.json or the files of one)"
    fix = "name a folder that has one: model.tokenizer"
    if not any(True for pattern in (*_FILES, "tokenizer_config.json") for _ in folder.glob(pattern)):
        raise InputError(none, where=name, fix=fix)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=settings.trust_remote_code
            )
        words = len(tokenizer.get_vocab())
    except Exception as error:  # broken files make the reader raise whatever they lead it to
        raise InputError(f"its tokenizer cannot be read ({first_line(error)})", where=name, fix=fix) from error
    if words <= len(tokenizer.all_special_ids):
        raise InputError(none, where=name, fix=fix)
    if settings.chat_template is not None:
        tokenizer.chat_template = _read_template(Path(settings.chat_template).expanduser())
    return tokenizer


def _read_template(path: Path) -> str:
    import jinja2

    try:
        text = path.read_text(encoding="utf-8")
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
            re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", text)
        )
    except OSError as error:
        raise InputError(f"the chat template cannot be read ({error.strerror})", where=str(path)) from None
    except UnicodeDecodeError:
        raise InputError("the chat template is not UTF-8 text", where=str(path)) from None
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"the chat template is no Jinja ({error.message})", where=f"{path}:{error.lineno}") from None
    return text


def align_tokenizer(tokenizer: Any, model: Any) -> dict[str, Any]:
    """Give `tokenizer` and `model` one pad token and the end tokens of both; both are changed in place.

    Returns facts (json-able): `pad` {token, id, how: own | unused | eos | none}, `end_tokens` (ids, ascending),
    `end_of_turn` (the id that the chat template ends an answer with, or None), `added_end_tokens`,
    `chat_template` (sha256, or None).
    """
    facts: dict[str, Any] = {"pad": _align_pad(tokenizer, model)}
    generation = getattr(model, "generation_config", None)
    known = _ids(getattr(generation, "eos_token_id", None)) | _ids(getattr(model.config, "eos_token_id", None))
    turn = end_of_turn(tokenizer)
    ends = sorted(known | _ids(tokenizer.eos_token_id) | _ids(turn))
    if generation is not None and ends:
        generation.eos_token_id = ends if len(ends) > 1 else ends[0]
    template = getattr(tokenizer, "chat_template", None)
    text = template if isinstance(template, str) else repr(sorted(template.items())) if template else None
    return facts | {
        "end_tokens": ends,
        "end_of_turn": turn,
        "added_end_tokens": [i for i in ends if i not in known],
        "chat_template": hashlib.sha256(text.encode()).hexdigest() if text else None,
    }


def _ids(value: Any) -> set[int]:
    return set() if value is None else {value} if isinstance(value, int) else set(value)


def _align_pad(tokenizer: Any, model: Any) -> dict[str, Any]:
    how = "own"
    if tokenizer.pad_token_id is None:
        rows = embedding_rows(model)
        vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        inside = [word for word, i in vocabulary if rows is None or i < rows]
        unused = next((w for w in inside if _PAD.fullmatch(w)), None)
        unused = unused or next((w for w in inside if _RESERVED.fullmatch(w)), None)
        if unused is None and tokenizer.eos_token is None:
            return {"token": None, "id": None, "how": "none"}
        tokenizer.pad_token, how = (unused, "unused") if unused else (tokenizer.eos_token, "eos")
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return {"token": tokenizer.pad_token, "id": tokenizer.pad_token_id, "how": how}


def end_of_turn(tokenizer: Any) -> int | None:
    """Id of the first special token that the chat template writes after an answer; None without one."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        tail = text[text.rindex(_ANSWER) + len(_ANSWER) :]
        ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    except Exception:  # a template may refuse these messages; then the tokenizer's own end token has to do
        return None
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return next((i for i in ids if i in special), None)


def embedding_rows(model: Any) -> int | None:
    """Rows of the token embedding; None for a model without one."""
    try:
        table = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return getattr(table, "num_embeddings", None)


def highest_id(tokenizer: Any) -> tuple[int, str]:
    """The largest id that `tokenizer` can give, and its token."""
    word, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return number, word


def resize_vocabulary(model: Any, rows: int) -> None:
    """Grow the token embedding (and an untied head) of `model` to `rows`; new rows are the mean of the old ones."""
    import torch

    old = embedding_rows(model) or 0
    with quiet(), torch.random.fork_rng(devices=[]), torch.no_grad():
        model.resize_token_embeddings(rows, mean_resizing=False)
        head = model.get_output_embeddings()
        tables = [model.get_input_embeddings().weight, getattr(head, "weight", None), getattr(head, "bias", None)]
        for table in tables:
            if table is not None and table.shape[0] == rows:
                table[old:] = table[:old].float().mean(0).to(table.dtype)
