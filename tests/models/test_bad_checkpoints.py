"""Each broken or mismatched checkpoint is one sentence that says what, where and what to do; nothing is guessed."""

from __future__ import annotations

import json
import pickle
import struct

import pytest
import torch

from luthier.errors import InputError
from luthier.models import ModelSettings, load, verify


class Evil:
    def __reduce__(self):
        return (print, ("this code must not run",))


def edit(path, **changes):
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, **changes}))


def header_of(path) -> tuple[dict, bytes]:
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(path, header: dict, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def cut_in_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:200])


def longer(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"x")


def nearly_empty(folder):
    (folder / "model.safetensors").write_bytes(b"abc")


def pickled(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Evil()))


def zipped(folder):
    torch.save({"a": torch.ones(2)}, folder / "model.safetensors")


def text_file(folder):
    (folder / "model.safetensors").write_text("<html>404 not found, sorry</html>")


def bad_header(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 9) + b"[1, 2, 3]")


def overlapping(folder):
    path = folder / "model.safetensors"
    header, data = header_of(path)
    header["model.norm.weight"]["data_offsets"] = [0, 64]
    with_header(path, header, data)


def wrong_dtype(folder):
    path = folder / "model.safetensors"
    header, data = header_of(path)
    header["model.norm.weight"]["dtype"] = "F17"
    with_header(path, header, data)


def lacking(folder):
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if "layers.1.mlp" not in k}, path, metadata={"format": "pt"})


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def no_config(folder):
    (folder / "config.json").unlink()


def adapter(folder):
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')


def config(text):
    return lambda folder: (folder / "config.json").write_text(text)


def changed(**values):
    return lambda folder: edit(folder / "config.json", **values)


def no_tokenizer(folder):
    for path in folder.glob("token*"):
        path.unlink()


def only_tokenizer_config(folder):
    (folder / "tokenizer.json").unlink()


def broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model"')


BAD = {
    "truncated": (cut, r"model.safetensors: is cut short \(\d+ bytes of \d+\); fetch or copy the file again"),
    "truncated header": (cut_in_header, "is cut short inside its header"),
    "trailing bytes": (longer, "holds more than its header says"),
    "three bytes": (nearly_empty, "is not a safetensors file"),
    "pickle": (pickled, "is a pickle under the name of a safetensors file and was not opened"),
    "torch zip": (zipped, "is a pickle under the name of a safetensors file and was not opened"),
    "html": (text_file, "is not a safetensors file"),
    "header no object": (bad_header, "its header is not that of a safetensors file"),
    "overlap": (overlapping, "gives tensor '.*' a wrong place or size"),
    "unknown dtype": (wrong_dtype, "its header is not that of a safetensors file"),
    "missing weights": (lacking, r"lacks 3 weights that LlamaForCausalLM needs: model.layers.1.mlp.down_proj.weight"),
    "no weights": (no_weights, "no weights in this folder"),
    "no config": (no_config, "no config.json in this folder"),
    "adapter": (adapter, r"is a PEFT adapter and no model; name its base \(some/base\)"),
    "config cut": (config('{"model_type": "llama",'), r"config.json:1:24: is not JSON"),
    "config list": (config("[]"), "expected a JSON object, found list"),
    "config bytes": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{"), "is not UTF-8 text"),
    "config empty": (config("{}"), "has no model_type"),
    "config type": (changed(model_type=7), "unknown model_type 7"),
    "unknown type": (changed(model_type="llamma"), "unknown model_type 'llamma'; did you mean 'llama'"),
    "remote code": (
        changed(model_type="mine", auto_map={"AutoConfig": "code.Config"}),
        "needs the Python code in this folder; set model.trust_remote_code: true",
    ),
    "architectures": (changed(architectures=["LlamaForDreams"]), "do not tell what to load it as; name it"),
    "no architectures": (changed(architectures=None), "do not tell what to load it as"),
    "more layers": (changed(num_hidden_layers=3), "lacks 9 weights that LlamaForCausalLM needs"),
    "wider": (changed(hidden_size=32), r"weights have another shape than LlamaForCausalLM needs"),
    "vocabulary": (changed(vocab_size=300), r"2 weights have another shape .* \[272, 16\] in the file and \[300, 16\]"),
    "text for number": (changed(hidden_size="big"), "the config is not valid|cannot be loaded"),
    "negative": (changed(num_hidden_layers=-1), "."),
    "zero heads": (changed(num_attention_heads=0), "."),
    "no tokenizer": (no_tokenizer, "has no tokenizer .*; name a folder that has one: model.tokenizer"),
    "no vocabulary": (only_tokenizer_config, "tokenizer"),
    "broken tokenizer": (broken_tokenizer, "its tokenizer cannot be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder_is_one_clear_sentence(write_folder, name, capfd):
    folder = write_folder()
    damage, sentence = BAD[name]
    damage(folder)
    with pytest.raises(InputError, match=sentence) as caught:
        load(ModelSettings(base=str(folder)))
    text = str(caught.value)
    assert "\n" not in text and text.endswith((".", "?")) and len(text) < 500
    assert str(folder) in text
    printed = capfd.readouterr()
    assert printed.out == "" and "must not run" not in printed.err


CHEAP = [n for n in BAD if n.split()[0] not in ("missing", "more", "wider", "vocabulary", "text", "negative", "zero")]


@pytest.mark.parametrize("name", CHEAP)
def test_verify_finds_it_without_loading(write_folder, name):
    folder = write_folder()
    BAD[name][0](folder)
    with pytest.raises(InputError, match=BAD[name][1]):
        verify(ModelSettings(base=str(folder)))


def shards(folder):
    return sorted(path.name for path in folder.glob("model-*.safetensors"))


def test_a_missing_shard_is_named(write_folder):
    folder = write_folder(max_shard_size="8KB")
    gone = shards(folder)[1]
    (folder / gone).unlink()
    with pytest.raises(InputError, match=f"names 1 of .* files that are not there: {gone}"):
        load(ModelSettings(base=str(folder)))


def test_an_index_that_names_missing_tensors(write_folder):
    folder = write_folder(max_shard_size="8KB")
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=names | {"model.layers.9.self_attn.q_proj.weight": shards(folder)[0]})
    with pytest.raises(InputError, match=r"names 1 tensors that their files do not hold: model.layers.9"):
        verify(ModelSettings(base=str(folder)))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not JSON"),
        ('{"weight_map": []}', "has no weight_map"),
        ('{"weight_map": {"a": "../../etc/passwd"}}', "names a file outside its folder"),
        ('{"weight_map": {"a": 3}}', "has no weight_map"),
    ],
)
def test_a_bad_index(write_folder, content, sentence):
    folder = write_folder(max_shard_size="8KB")
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match=sentence):
        verify(ModelSettings(base=str(folder)))


def test_a_torch_file_with_more_than_tensors_is_refused_unrun(write_folder, capfd):
    folder = write_folder()
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": torch.ones(16), "evil": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="torch's weights-only loader refused it"):
        load(ModelSettings(base=str(folder), weights="torch"))
    assert "must not run" not in capfd.readouterr().out
    with pytest.raises(InputError, match=r"no pytorch_model\.bin"):
        verify(ModelSettings(base=str(write_folder("other")), weights="torch"))


def test_a_kind_that_the_architecture_does_not_have(write_folder):
    with pytest.raises(InputError, match=r"cannot be loaded as seq2seq; choose model\.kind"):
        load(ModelSettings(base=str(write_folder()), kind="seq2seq"))


@pytest.mark.parametrize(
    ("base", "sentence"),
    [
        ("./nowhere", "no such file or folder"),
        ("nowhere/at/all", "no such file or folder"),
        ("missing.gguf", "no such file or folder"),
        ("no-such-model", "the hub could not be reached"),
        ("some-one/no-such-model", "the hub could not be reached"),
        (
            "package:no_such_package/model.gguf",
            r"'no_such_package' is not installed; run: .*pip install .*no-such-package",
        ),
        ("package:luthier/nothing.gguf", "the package 'luthier' holds no 'nothing.gguf'"),
        ("package:luthier/../../secret", "expected package:name/path"),
        ("package:os.path/x", "expected package:name/path"),
        ("package:", "expected package:name/path"),
        ("package:luthier", "no config.json in this folder"),
    ],
)
def test_a_base_that_is_not_there(base, sentence, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=sentence) as caught:
        load(ModelSettings(base=base))
    assert "\n" not in str(caught.value)


def test_a_file_in_place_of_a_folder(write_folder):
    folder = write_folder()
    with pytest.raises(InputError, match=r"must be a folder or a \.gguf file; give the folder"):
        load(ModelSettings(base=str(folder / "model.safetensors")))
    with pytest.raises(InputError, match=r"no file 'x.gguf' in this folder"):
        load(ModelSettings(base=str(folder), gguf_file="x.gguf"))
    (folder / "config.json").unlink()
    (folder / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"holds GGUF files \(a.gguf\) and no config.json; name the file"):
        load(ModelSettings(base=str(folder)))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{% for m in messages %}", "the chat template is no Jinja"),
        (b"\xff\xfe", "the chat template is not UTF-8 text"),
        (None, "the chat template cannot be read"),
    ],
)
def test_a_bad_chat_template(write_folder, tmp_path, content, sentence):
    path = tmp_path / "template.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        load(ModelSettings(base=str(write_folder()), chat_template=str(path)))


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580, 0x4B50])
def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path, length):
    import torch
    from safetensors.torch import load_file

    from luthier.models.checkpoint import read_header

    header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(length)
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + header + bytes(8))
    assert torch.equal(load_file(path)["w"], torch.zeros(2))  # the judge: the format's own library
    assert read_header(path)["w"]["shape"] == [2]
