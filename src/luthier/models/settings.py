"""Settings of the recipe's `model`: which base, as what kind of model, in which numbers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Kind = Literal[
    "causal-lm",
    "seq2seq",
    "sequence-classifier",
    "masked-lm",
    "encoder",
    "image-classifier",
    "speech-seq2seq",
]


class Layout(BaseModel):
    """Where the parts of a model are, for architectures whose structure does not tell (see `Topology.of`).

    Attributes:
        blocks: path of the list of blocks, or several.
        attention: what the part of a block that mixes positions is called.
        head: path of the output linear.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    blocks: str | tuple[str, ...] | None = None
    attention: str | None = None
    head: str | None = None


class ModelSettings(BaseModel):
    """What to start from.

    Attributes:
        base: a folder, a `.gguf` file, `package:name/path` (a file or folder inside an installed Python package,
            which is found without importing it), or the id of a model on the hub.
        kind: what to load it as; `auto` reads it from the `architectures` of its config.
        tokenizer: where its tokenizer is, if not beside it: any form that `base` may have.
        dtype: numbers of the weights; `auto` is the checkpoint's own on an accelerator, float32 without one.
        attention: transformers' attention implementation; `auto` is its choice (sdpa where the model has it).
        revision: commit, tag or branch on the hub.
        gguf_file: name of the GGUF file inside `base`, if that is a folder or hub id.
        weights: `safetensors`, or `torch` to read a `.bin` file with torch's weights-only loader.
        trust_remote_code: run model code that comes with the checkpoint. Off unless you trust its author.
        resize_vocabulary: give the tokens that have no row in the embedding one (the mean of the others); off, such
            a tokenizer is the finding `model.vocabulary`.
        num_labels: labels of a classifier; a number other than the checkpoint's gives it a new head.
        chat_template: path of a Jinja file to use instead of the tokenizer's own chat template.
        context: longest input in tokens, if not what the model's config says.
        layout: where the model's parts are, only needed if an error asks for it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    base: str = Field(min_length=1)
    kind: Literal["auto"] | Kind = "auto"
    tokenizer: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    revision: str | None = None
    gguf_file: str | None = None
    weights: Literal["safetensors", "torch"] = "safetensors"
    trust_remote_code: bool = False
    resize_vocabulary: bool = False
    num_labels: int | None = Field(default=None, ge=1)
    chat_template: str | None = None
    context: int | None = Field(default=None, ge=1)
    layout: Layout = Layout()

    @field_validator("base", "tokenizer", "gguf_file", "chat_template")
    @classmethod
    def _no_control_characters(cls, value: str | None) -> str | None:
        if value is not None and any(ord(letter) < 32 for letter in value):
            raise ValueError("must not hold control characters")
        return value
