"""`luthier generate`: answers of one model, or of several that a decoder mixes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.errors import InputError

EXAMPLES = (
    'Examples: luthier generate runs/quickstart-1/6-deploy/release --prompt "How are you?" | '
    "luthier generate --decoder eft --set base=BIG tuned=SMALL-CHAT tuned_base=SMALL --format base=plain "
    "--prompts questions.jsonl -o answers.jsonl | cat questions.txt | luthier generate --recipe decoder.yaml"
)


def generate(
    model: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]", help="One model: folder, GGUF, package:..., hub id.")
    ] = None,
    decoder: Annotated[str | None, typer.Option("--decoder", help="How several models are mixed: eft, ...")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Settings of the decoder: base=A tuned=B weight=0.5 ...")
    ] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="A decoder recipe (YAML).")] = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be given again.")] = None,
    prompts: Annotated[
        str | None, typer.Option("--prompts", help="Rows with prompts (JSONL, CSV, Parquet, ...; .txt by line).")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="New JSONL file for the answers.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the answers that a run which broke off left beside -o.")
    ] = False,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help='chat, plain or "Q {prompt} A"; TERM=... for one term.')
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="At most so many tokens of answer.")] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="A string that ends an answer.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the most probable token.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Smallest set of tokens with this mass.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Only the so many most probable tokens.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Only tokens of this share of the largest probability.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 against repeating.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.")] = None,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="Write each term's log-probabilities.")] = False,
    dtype: Annotated[str, typer.Option(help="Numbers of the weights: auto, float32, bfloat16, float16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    batch_tokens: Annotated[int, typer.Option(help="Tokens, padding included, that a batch may hold.")] = 4096,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Answer prompts: from the command line, a file or standard input. Answers are JSON lines, or text for a person."""
    from luthier.pipeline.answer_file import AnswerFile, about_run
    from luthier.pipeline.generating import answers, open_asked, prompt_rows, read_decoder

    words = [word for word in model or () if "=" not in word or Path(word).exists()]
    given = [*(settings or ()), *(word for word in model or () if word not in words)]
    if sum((len(words) == 1, decoder is not None, recipe is not None)) != 1 or len(words) > 1:
        raise InputError("name one model, or --decoder, or --recipe", fix="luthier generate --help has examples")
    if resume and output is None:
        raise InputError("there is no file to go on with", where="--resume", fix="name it with --output")
    named: Any = recipe or {"decoder": decoder if decoder else {"method": "single", "base": words[0]}}
    asked = read_decoder(named, given)
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "seed": seed}
    sampling["repetition_penalty"] = repetition_penalty
    changes: dict[str, Any] = {
        "formats": {**asked.formats, **_formats(formats or ())},
        "sampling": {**asked.sampling, **{key: value for key, value in sampling.items() if value is not None}},
    }
    changes |= {"max_new_tokens": max_new_tokens} if max_new_tokens is not None else {}
    changes |= {"stop": tuple(stop)} if stop else {}
    asked = type(asked)(**{**vars(asked), **changes})
    if prompt:
        rows: Iterable[Any] = prompt_rows("--prompt", prompt)
    elif prompts is not None:
        rows = prompt_rows(prompts)
    elif not sys.stdin.isatty():
        rows = prompt_rows("standard input", sys.stdin)
    else:
        raise InputError("there is no prompt", fix="give --prompt, --prompts FILE, or lines on standard input")
    about = about_run(asked, logprobs=logprobs, dtype=dtype, device=device, batch_tokens=batch_tokens)
    file = None if output is None else AnswerFile(output, about, resume=resume)
    if file is not None:
        rows = file.unanswered(rows)
    mixture = open_asked(asked, dtype=dtype, device=device)
    talk = output is None and prompt is not None and len(prompt) == 1 and sys.stdout.isatty()
    told = _Typing(mixture.lead.tokenizer) if talk else None
    with _bar(quiet or talk) as progress:
        found = answers(
            mixture,
            asked,
            rows,
            logprobs=logprobs,
            batch_tokens=batch_tokens,
            first=0 if file is None else file.done,
            progress=progress,
            tell=told,
        )
        if file is not None:
            file.write(found)
            return
        for record in found:
            if told is not None:
                print(told.rest(record["text"]), flush=True)
            elif prompt and len(prompt) == 1 and not logprobs:
                print(record["text"])
            else:
                print(json.dumps(record, ensure_ascii=False), flush=True)


def _formats(given: Sequence[str]) -> dict[str, str]:
    """`plain` for all terms, `base=plain` for one."""
    found = {}
    for text in given:
        name, sign, value = text.partition("=")
        term = bool(sign) and name.isidentifier()
        found[name if term else ""] = value if term else text
    return found


class _Typing:
    """Shows an answer as it comes; the last characters wait, as they may change with the next token."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.ids, self.shown = tokenizer, list[int](), ""

    def __call__(self, numbers: Sequence[int], tokens: Sequence[int]) -> None:
        self.ids.append(tokens[0])
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\ufffd") and text.startswith(self.shown):
            print(text[len(self.shown) :], end="", flush=True)
            self.shown = text

    def rest(self, text: str) -> str:
        """What of the whole answer was not shown yet."""
        return text[len(self.shown) :] if text.startswith(self.shown) else ""


@contextmanager
def _bar(quiet: bool) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.completed} answers"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet) as progress:
        task = progress.add_task("generate", total=None)
        yield lambda done: progress.update(task, completed=done)
