"""The model card of a release: what it is, what it was made from, what was measured, and what nobody knows.

A card is the part of a release that people read (Mitchell et al. 2019, arXiv 1810.03993). It is Markdown behind a
YAML head, as the Hugging Face hub shows it. Every figure comes from the run's own records; one that is missing is
stated as "not measured" and never guessed. Text from recipes, rows and configs is escaped, so that a name such as
`a|b` or `<script>` cannot change the page around it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

NOT_MEASURED = "not measured"
NOT_STATED = "not stated"
SECTIONS = (
    "What it is",
    "Data",
    "How it was tuned",
    "Results",
    "What was forgotten",
    "Limits",
    "How to use",
    "How to reproduce",
)
_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~$])")
_HEADING = re.compile(r"^## +(.*?)\s*$")


def model_card(facts: Mapping[str, Any]) -> str:
    """Markdown of the card.

    `facts` (json-able); every key may be missing:
        name, base, kind (model | adapter), license, language (text or list), summary, max_length, parameters;
        data, tuning: mappings of figures, shown as lists;
        results: list of {name, role (target | forgetting | safety | report), n, base, tuned, gain, low, high, unit},
            such as the `tasks` of a report; forgetting and safety tasks go under "What was forgotten";
        limits: list of sentences; findings: list of {level, code, message}, of which warnings and errors are limits;
        reproduce: {command, recipe_yaml, versions: {...}, hashes: {...}}.
    """
    results = [part for part in facts.get("results") or () if isinstance(part, Mapping)]
    lost = [part for part in results if part.get("role") in ("forgetting", "safety")]
    bodies = {
        "What it is": _what(facts),
        "Data": _listed(facts.get("data")),
        "How it was tuned": _listed(facts.get("tuning")),
        "Results": _table([part for part in results if part not in lost]),
        "What was forgotten": _table(lost) if lost else f"Forgetting was {NOT_MEASURED}.",
        "Limits": _limits(facts, bool(lost)),
        "How to use": _use(facts),
        "How to reproduce": _reproduce(facts.get("reproduce") or {}),
    }
    parts = [f"---\n{_head(facts)}---", f"# {escape(facts.get('name') or 'Tuned model')}"]
    parts += [f"## {name}\n\n{bodies[name]}" for name in SECTIONS]
    return "\n\n".join(parts) + "\n"


def empty_sections(card: str) -> list[str]:
    """Those of `SECTIONS` that `card` lacks or leaves empty. Headings inside code blocks do not count."""
    bodies: dict[str, list[str]] = {}
    current: list[str] = []
    fence = ""
    for line in card.splitlines():
        mark = re.match(r"`{3,}", line)
        if mark and (not fence or (len(mark[0]) >= len(fence) and not line.strip("` "))):
            fence = "" if fence else mark[0]
        heading = None if fence else _HEADING.match(line)
        if heading:
            current = bodies.setdefault(heading[1], [])
        else:
            current.append(line)
    return [name for name in SECTIONS if not any(line.strip("` \t") for line in bodies.get(name, ()))]


def escape(value: Any) -> str:
    """`value` as one line of Markdown text that shows exactly these characters."""
    text = " ".join(str(value).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = _SPECIAL.sub(r"\\\1", text)
    return re.sub(r"^(-|=|\d+\.)", r"\\\1", text)


def _head(facts: Mapping[str, Any]) -> str:
    head: dict[str, Any] = {}
    if facts.get("base"):
        head["base_model"] = str(facts["base"])
    head["library_name"] = "peft" if facts.get("kind") == "adapter" else "transformers"
    for key in ("license", "language"):
        if facts.get(key):
            head[key] = facts[key]
    return yaml.safe_dump(head | {"tags": ["luthier"]}, sort_keys=False, allow_unicode=True)


def _what(facts: Mapping[str, Any]) -> str:
    kind = "An adapter for" if facts.get("kind") == "adapter" else "A tuned copy of"
    lines = [f"{kind} {escape(facts.get('base') or 'a base model that is ' + NOT_STATED)}, made with Luthier."]
    if facts.get("summary"):
        lines.append(escape(facts["summary"]))
    rows = [("License", facts.get("license") or NOT_STATED), ("Parameters", facts.get("parameters"))]
    rows.append(("Longest input in tokens", facts.get("max_length")))
    listed = "\n".join(f"- {name}: {_value(value, NOT_STATED)}" for name, value in rows)
    return "\n\n".join([*lines, listed])


def _listed(part: Any) -> str:
    if not isinstance(part, Mapping) or not part:
        return f"This was {NOT_STATED}."
    return "\n".join(f"- {escape(str(key).replace('_', ' '))}: {_value(value)}" for key, value in part.items())


def _value(value: Any, missing: str = NOT_MEASURED) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return missing
    if isinstance(value, Mapping):
        return ", ".join(f"{escape(key)} {_value(part, missing)}" for key, part in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(part, missing) for part in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else escape(value)


def _table(results: Iterable[Mapping[str, Any]]) -> str:
    rows = [_row(part) for part in results]
    if not rows:
        return f"The results were {NOT_MEASURED}."
    head = ["| Task | Role | Items | Base | Tuned | Change (95% interval) | Unit |"]
    head.append("| --- | --- | ---: | ---: | ---: | ---: | --- |")
    return "\n".join([*head, *rows])


def _row(part: Mapping[str, Any]) -> str:
    gain = _figure(part.get("gain"), sign=True)
    low, high = _figure(part.get("low"), sign=True), _figure(part.get("high"), sign=True)
    change = gain if gain == NOT_MEASURED else f"{gain} (interval {NOT_MEASURED})"
    if NOT_MEASURED not in (gain, low, high):
        change = f"{gain} ({low} to {high})"
    cells = [escape(part.get("name") or "unnamed"), escape(part.get("role") or "report"), _value(part.get("n"))]
    cells += [_figure(part.get("base")), _figure(part.get("tuned")), change, escape(part.get("unit") or "points")]
    return "| " + " | ".join(cells) + " |"


def _figure(value: Any, *, sign: bool = False) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return NOT_MEASURED
    return f"{value:+.2f}" if sign else f"{value:.2f}"


def _limits(facts: Mapping[str, Any], forgetting: bool) -> str:
    lines = [escape(text) for text in facts.get("limits") or ()]
    lines += [
        f"{escape(part.get('message', ''))} ({escape(part.get('code', ''))}"
        + (", waived)" if part.get("waived") else ")")
        for part in facts.get("findings") or ()
        if part.get("level") in ("warn", "error")
    ]
    if not forgetting:
        lines.append("Whether it lost abilities of its base was not measured.")
    lines.append("Scores hold for the tasks named above; behaviour outside them, bias and safety were not measured.")
    return "\n".join(f"- {line}" for line in lines)


def _use(facts: Mapping[str, Any]) -> str:
    base = json.dumps(str(facts.get("base") or "path/of/the/base"), ensure_ascii=True)
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    if facts.get("kind") == "adapter":
        lines.append("from peft import PeftModel")
    lines += ["", 'folder = "."  # of this release', "tokenizer = AutoTokenizer.from_pretrained(folder)"]
    if facts.get("kind") == "adapter":
        lines.append(f"base = AutoModelForCausalLM.from_pretrained({base})")
        lines.append("model = PeftModel.from_pretrained(base, folder)")
    else:
        lines.append("model = AutoModelForCausalLM.from_pretrained(folder)")
    lines += [
        'inputs = tokenizer("Hello", return_tensors="pt")  # with a chat template: tokenizer.apply_chat_template',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))",
    ]
    text = "`serve.yaml` states the tokens that end an answer and the longest input."
    return _code("\n".join(lines), "python") + "\n\n" + text


def _reproduce(part: Mapping[str, Any]) -> str:
    blocks = []
    if part.get("command"):
        blocks.append(_code(str(part["command"]), "sh"))
    if part.get("recipe_yaml"):
        blocks.append("The recipe:\n\n" + _code(str(part["recipe_yaml"]), "yaml"))
    for key, title in (("versions", "Versions"), ("hashes", "Hashes")):
        if part.get(key):
            blocks.append(f"{title}:\n\n{_listed(part[key])}")
    return "\n\n".join(blocks) or f"The command and the recipe were {NOT_STATED}."


def _code(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of back ticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
