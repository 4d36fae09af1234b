"""Small classifiers, one of texts and one of pictures, and rows for them."""

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast, ViTConfig
from transformers import ViTForImageClassification as ViT

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
WORDS = [f"w{number}" for number in range(40)]


def vit(labels=3, seed=0):
    torch.manual_seed(seed)
    return ViT(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=labels, **SHAPE, **STILL)).eval()


def bert(labels=3, seed=0):
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(vocab_size=45, num_labels=labels, **SHAPE, **STILL)).eval()


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def text_rows(count=24, seed=0):
    """Texts of 2 to 9 words; the class is the first word's number modulo 3."""
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        ids = draw.integers(0, 40, size=draw.integers(2, 10))
        found.append({"text": " ".join(WORDS[i] for i in ids), "label": int(ids[0] % 3)})
    return found


def picture_rows(count=24, seed=0):
    """Pictures of 8 by 8; the class says which third is bright."""
    draw = np.random.default_rng(seed)
    found = []
    for number in range(count):
        picture = draw.integers(0, 100, size=(8, 8))
        picture[:, 3 * (number % 3) : 3 * (number % 3) + 2] += 150
        found.append({"image": picture.astype(np.uint8), "label": number % 3})
    return found


def case(kind):
    """(model, its tokenizer or None, rows, the whole of the rows as one batch)."""
    if kind == "vit":
        rows = picture_rows()
        pixels = torch.tensor(np.stack([row["image"] for row in rows]), dtype=torch.float32)[:, None] / 255
        batch = {"pixel_values": pixels}
        model, reads = vit(), None
    else:
        rows, reads, model = text_rows(), tokenizer(), bert()
        batch = dict(reads([row["text"] for row in rows], padding=True, return_tensors="pt"))
        batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return model, reads, rows, batch | {"labels": torch.tensor([row["label"] for row in rows])}
