"""`luthier generate`: one model or a decoder; prompts from the command, a file and standard input; JSON lines out."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time

import pytest

from luthier.cli import app, main
from luthier.worlds import tiny

TINY = "package:luthier/worlds/tiny-lm"


@pytest.fixture
def luthier(capsys, monkeypatch):
    """Runs a command in this process: (exit code, standard output, standard error)."""

    def run(*arguments, stdin=None):
        monkeypatch.setattr(sys, "argv", ["luthier", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin or ""))
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return ended.value.code or 0, said.out, said.err

    assert app
    return run


def records(text):
    return [json.loads(line) for line in text.splitlines()]


def test_one_prompt_is_answered_in_text_and_several_in_json_lines(luthier):
    code, text, _ = luthier("generate", TINY, "-p", "copy: cat", "--max-new-tokens", "6")
    assert code == 0
    code, lines, _ = luthier("generate", TINY, "-p", "copy: cat", "-p", "add: 2", "--max-new-tokens", "6")
    assert [record["prompt"] for record in records(lines)] == ["copy: cat", "add: 2"]
    assert records(lines)[0]["text"] == text.rstrip("\n")


def test_files_and_standard_input_give_the_same_answers(luthier, tmp_path):
    prompts = ["copy: cat", "reverse: dog", "add: 2 3"]
    (tmp_path / "p.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    rows = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    (tmp_path / "p.jsonl").write_text(rows, encoding="utf-8")
    how = ("--max-new-tokens", "6", "--temperature", "1.0", "--seed", "3", "--quiet")
    out = tmp_path / "out.jsonl"
    texts = []
    for given, stdin in (
        (["--prompts", tmp_path / "p.txt"], None),
        (["--prompts", tmp_path / "p.jsonl"], None),
        ([], rows),
        ([], "\n".join(prompts)),
    ):
        code, said, error = luthier("generate", TINY, *given, *how, "-o", out, stdin=stdin)
        assert (code, said, error) == (0, "", "")
        texts.append([record["text"] for record in records(out.read_text(encoding="utf-8"))])
        out.unlink()
    assert all(found == texts[0] for found in texts)
    assert len(texts[0]) == 3
    assert list(tmp_path.glob(".*")) == []


def test_a_recipe_and_its_overrides(luthier, tmp_path):
    recipe = tmp_path / "decoder.yaml"
    recipe.write_text(
        f"decoder: {{method: eft, base: '{TINY}', tuned: '{TINY}'}}\n"
        "formats: {base: plain, tuned: chat}\nmax_new_tokens: 5\nsampling: {temperature: 0.0}\n",
        encoding="utf-8",
    )
    code, lines, _ = luthier("generate", "--recipe", recipe, "--set", "weight=0.5", "-p", "copy: cat", "--logprobs")
    (record,) = records(lines)
    assert code == 0
    assert set(record["logprobs"]) == {"base", "tuned", "mixture"}
    assert all(len(values) == len(record["tokens"]) for values in record["logprobs"].values())


@pytest.mark.parametrize(
    ("arguments", "stdin", "words"),
    [
        ((), None, "name one model, or --decoder, or --recipe"),
        ((TINY, "--decoder", "eft", "-p", "x"), None, "name one model"),
        (("--decoder", "efd", "-p", "x"), None, "did you mean 'eft'"),
        (("--decoder", "eft", "--set", f"base={TINY}", "-p", "x"), None, "decoder.tuned: Field required"),
        (("--decoder", "eft", "--set", "bse=x", "-p", "x"), None, "unknown key 'bse'; did you mean 'base'"),
        ((TINY, "-p", ""), None, "--prompt:1: the prompt is empty"),
        ((TINY,), "", "there is no prompt"),
        ((TINY,), "{broken", "standard input:1: not valid JSON"),
        ((TINY,), '{"answer": 1}', "neither prompt nor messages"),
        ((TINY, "-p", "x", "--format", "wrong"), None, "no format 'wrong'"),
        ((TINY, "-p", "x", "--format", "other=plain"), None, "there is no term other"),
        ((TINY, "-p", "x", "--temperature", "-1"), None, "sampling: temperature"),
        ((TINY, "-p", "x " * 3000), None, "the model's context ends at"),
        ((TINY, "--prompts", "missing.jsonl"), None, "missing.jsonl"),
        (("nowhere", "-p", "x"), None, "nowhere"),
        (("--decoder", "eft", "--set", f"base={TINY}", f"tuned={TINY}", "weight=.nan", "-p", "x"), None, "finite"),
    ],
)
def test_bad_input_is_one_sentence(luthier, arguments, stdin, words):
    code, said, error = luthier("generate", *arguments, stdin=stdin)
    assert (code, said) == (2, "")
    assert words in error
    assert len(error.strip().splitlines()) == 1


def test_an_answer_file_is_not_overwritten(luthier, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("mine", encoding="utf-8")
    code, _, error = luthier("generate", TINY, "-p", "x", "-o", out)
    assert code == 2
    assert "this place is taken" in error
    assert out.read_text(encoding="utf-8") == "mine"


def test_what_a_broken_run_left_is_not_overwritten(luthier, tmp_path):
    part = tmp_path / "out.jsonl.part"
    part.write_text("mine", encoding="utf-8")
    code, _, error = luthier("generate", TINY, "-p", "x", "-o", tmp_path / "out.jsonl")
    assert code == 2
    assert "a run that broke off" in error
    assert part.read_text(encoding="utf-8") == "mine"
    code, _, error = luthier("generate", TINY, "-p", "x", "-o", tmp_path / "out.jsonl", "--resume")
    assert code == 2
    assert "does not say what the answers in out.jsonl.part were made with" in error
    assert part.read_text(encoding="utf-8") == "mine"


def test_a_broken_run_goes_on_to_the_same_bytes_and_only_with_what_it_was_asked(luthier, tmp_path):
    """600 prompts in three chunks: killed in the first or later, refused with other settings, stopped by a full disk,
    and gone on with."""
    out, part, whole = (tmp_path / name for name in ("out.jsonl", "out.jsonl.part", "whole.jsonl"))
    rows = [json.dumps({"id": f"r{i}", "prompt": f"copy: {'cat' * (i % 5 + 1)} {i}"}) + "\n" for i in range(600)]
    for name, some in (("p", rows), ("swapped", [rows[1], rows[0], *rows[2:]]), ("few", rows[:9])):
        (tmp_path / f"{name}.jsonl").write_text("".join(some), encoding="utf-8")
    asked = ["generate", TINY, "--prompts", tmp_path / "p.jsonl", "--quiet", "--max-new-tokens", "4"]
    asked += ["--temperature", "1.0", "--seed", "3"]
    assert luthier(*asked, "-o", whole) == (0, "", "")
    command = [sys.executable, "-m", "luthier", *asked, "-o", out]
    with subprocess.Popen(command) as running:
        while running.poll() is None and not part.exists():
            time.sleep(0.01)
        running.kill()
    assert not out.exists()
    lines = whole.read_bytes().splitlines(keepends=True)
    assert part.read_bytes() == whole.read_bytes()[: part.stat().st_size]
    part.write_bytes(b"".join(lines[:300]) + lines[300][:20])  # wherever it was killed: inside of the second chunk

    before = part.read_bytes()
    for change, words in (
        (["--seed", "4"], "belongs to a run that differs in sampling;"),
        (["--max-new-tokens", "5", "--logprobs"], "differs in logprobs, max_new_tokens;"),
        (["--set", f"base={tiny.folder()}"], "differs in decoder, the files of base;"),
        (["--prompts", tmp_path / "swapped.jsonl"], "answer 1 is of another prompt"),
        (["--prompts", tmp_path / "few.jsonl"], "answer 10 is of another prompt"),
    ):
        code, _, error = luthier(*asked, "-o", out, "--resume", *change)
        assert code == 2
        assert words in error
        assert len(error.strip().splitlines()) == 1
        assert part.read_bytes() == before

    limit = ["prlimit", f"--fsize={len(before) + 99}"]
    full = subprocess.run([*limit, *command, "--resume"], capture_output=True, text=True)
    assert (full.returncode, full.stdout) == (4, "")
    assert f"the disk is full; what was answered is in {part}, and --resume goes on from there" in full.stderr
    assert part.read_bytes() == whole.read_bytes()[: len(before) + 99]
    assert luthier(*asked, "-o", out, "--resume") == (0, "", "")
    assert out.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("out.jsonl.*"))
    assert not list(tmp_path.glob(".*"))


def test_a_run_that_gave_no_answer_leaves_no_file_and_resume_wants_a_file(luthier, tmp_path):
    out = tmp_path / "out.jsonl"
    assert luthier("generate", TINY, "-p", "x " * 3000, "-o", out)[0] == 2
    assert not list(tmp_path.iterdir())
    code, _, error = luthier("generate", TINY, "-p", "x", "--resume")
    assert code == 2
    assert "--resume: there is no file to go on with" in error
    assert luthier("generate", TINY, "-p", "x", "--max-new-tokens", "3", "-o", out, "--resume")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
