"""What a model learns from: from files of any common shape to batches of tokens.

Two halves. The first needs no model and works on text (stage 1 of a run):

    settings        the `data` section of a recipe
    formats, read   JSON Lines, JSON, CSV, TSV, Parquet, saved data sets and Python callables, as a stream of rows
    forms           text, completion, messages (OpenAI), Alpaca, ShareGPT, preference: recognised and made canonical
    clean, near_duplicates, contamination    what is empty, private, repeated, or leaked from the evaluation rows
    split, balance  who is training, validation, test; how often a training row is used
    selection       which of the training rows are used: the contract, and methods such as `perplexity`
    prepare         all of this together: three files of canonical rows and a data card
    rows            those files, read at random

The second needs the model's tokenizer (stage 2 and training): `encode` and `templates` (tokens and loss marks),
`store` (encoded examples on disk), `labelled` (the same for rows with a class), `batches` (the plan of an epoch),
`collate` (padded or packed tensors).

Beside both: `pictures` (pictures as text in a row, and back), `images` (pictures cut into tiles).

A canonical row is a plain mapping with `where` ("chats.jsonl:12"), `id` (16 hex digits, from its content), the columns
of exactly one form (`text`; `prompt`, `completion`; `messages`, maybe `tools`; `prompt`, `chosen`, `rejected`;
`prompt`, `completion`, `desirable`; `image`), and where the recipe asks for them `label` and `group`; columns that mean
nothing here are kept in `extra`.

Importing this package imports neither torch nor transformers; each name is fetched when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier.lazy import fetched, not_hidden_by_modules

METHODS: dict[str, str] = {
    "perplexity": "luthier.data.perplexity:PerplexityFilter",
}

_WHERE = {
    "DataSettings": "luthier.data.settings",
    "Source": "luthier.data.settings",
    "read_rows": "luthier.data.read",
    "import_callable": "luthier.data.read",
    "canonical": "luthier.data.forms",
    "recognise": "luthier.data.forms",
    "row_text": "luthier.data.clean",
    "Rows": "luthier.data.rows",
    "Scored": "luthier.data.selection",
    "Selected": "luthier.data.selection",
    "Selection": "luthier.data.selection",
    "SelectionContext": "luthier.data.selection",
    "tile_catty": "luthier.data.images",
    "Prepared": "luthier.data.prepare",
    "prepare": "luthier.data.prepare",
    "encode": "luthier.data.encode",
    "prompt_ids": "luthier.data.encode",
    "encode_split": "luthier.data.store",
    "Encodings": "luthier.data.store",
    "plan_epoch": "luthier.data.batches",
    "Step": "luthier.data.batches",
    "pad_batch": "luthier.data.collate",
    "pack_batch": "luthier.data.collate",
    "packing_is_exact": "luthier.data.collate",
}
__all__ = [
    "METHODS",
    "DataSettings",
    "Encodings",
    "Prepared",
    "Rows",
    "Scored",
    "Selected",
    "Selection",
    "SelectionContext",
    "Source",
    "Step",
    "canonical",
    "encode",
    "encode_split",
    "import_callable",
    "pack_batch",
    "packing_is_exact",
    "pad_batch",
    "plan_epoch",
    "prepare",
    "prompt_ids",
    "read_rows",
    "recognise",
    "row_text",
    "tile_catty",
]

if TYPE_CHECKING:
    from luthier.data.batches import Step, plan_epoch
    from luthier.data.clean import row_text
    from luthier.data.collate import pack_batch, packing_is_exact, pad_batch
    from luthier.data.encode import encode, prompt_ids
    from luthier.data.forms import canonical, recognise
    from luthier.data.images import tile_catty
    from luthier.data.prepare import Prepared, prepare
    from luthier.data.read import import_callable, read_rows
    from luthier.data.rows import Rows
    from luthier.data.selection import Scored, Selected, Selection, SelectionContext
    from luthier.data.settings import DataSettings, Source
    from luthier.data.store import Encodings, encode_split

__getattr__ = fetched(__name__, _WHERE)
not_hidden_by_modules(__name__, _WHERE)
