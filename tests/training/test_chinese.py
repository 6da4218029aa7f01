"""Chinese-CLIP in both of its layouts, with small random weights in the real formats."""

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ChineseCLIPConfig, ChineseCLIPModel

from clipret.bundle import ImageSpec, TextSpec
from clipret.errors import ClipretError
from clipret.export.pipeline import export_bundle
from clipret.text import Tokenizer
from clipret.training import chinese
from clipret.training.chinese import ChineseClip
from clipret.training.models import architecture, load_model
from clipret.training.run import RunFolder
from clipret.training.tokenizer import wordpiece_tokenizer_json

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    *"一辆红色的轿车狗在草地上abcde0123",
    "##a",
    "##b",
    "##3",
    "red",
    "##s",
    "。",
    "!",
]
TEXTS = ["一辆红色的轿车", "狗在草地上。", "reds, abc 车"]


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as save_pretrained writes it, with what the published ones have beside it."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    torch.manual_seed(2)
    text = {"vocab_size": len(WORDS), "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
    config = ChineseCLIPConfig(
        text_config={**text, "intermediate_size": 256, "max_position_embeddings": 64},
        vision_config={**vision, "intermediate_size": 512},
        projection_dim=32,
    )
    model = ChineseCLIPModel(config).eval()
    for parameter in model.parameters():  # as after training: nothing is zero or one
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    preprocess = {"do_center_crop": False, "size": {"height": 64, "width": 64}, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocess))
    return folder


@pytest.fixture(scope="module")
def ofa_sys(hugging_face: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as OFA-Sys's trainer saves them."""
    folder = tmp_path_factory.mktemp("ofa")
    write_checkpoint(load_model(str(hugging_face)).model, folder / "clip_cn_tiny.pt")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return folder / "clip_cn_tiny.pt"


def write_checkpoint(model: torch.nn.Module, path: Path) -> None:
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    state["module.bert.pooler.dense.weight"] = torch.zeros(128, 128)
    torch.save({"epoch": 3, "step": 7, "name": "x", "state_dict": state, "optimizer": {"lr": 1e-5}}, path)


def test_the_embeddings_are_those_of_transformers(hugging_face: Path) -> None:
    reference = ChineseCLIPModel.from_pretrained(hugging_face).eval()
    loaded = load_model(str(hugging_face))
    pixels = torch.rand(3, 3, 64, 64)
    ids = torch.from_numpy(Tokenizer(loaded.tokenizer_json, loaded.text)(TEXTS))
    with torch.inference_mode():
        vision = reference.vision_model(pixels).pooler_output
        image = reference.visual_projection(vision)
        hidden = reference.text_model(ids, attention_mask=(ids != 0).long()).last_hidden_state
        text = reference.text_projection(hidden[:, 0])
        torch.testing.assert_close(loaded.model.encode_image(pixels), image, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(loaded.model.encode_text(ids), text, rtol=1e-5, atol=1e-6)


def test_both_layouts_are_one_model(hugging_face: Path, ofa_sys: Path) -> None:
    first, second = load_model(str(hugging_face)), load_model(str(ofa_sys))
    assert first.source_sha256 == second.source_sha256
    assert first.config == second.config
    assert (first.image, first.text) == (second.image, second.text)
    assert first.image == ImageSpec(64, "squash", "bicubic")
    assert first.text == TextSpec(52, "none", "longest")
    assert (first.mean, first.std) == (second.mean, second.std)
    assert first.name == second.name
    assert architecture(str(hugging_face)) == architecture(str(ofa_sys)) == ("Chinese-CLIP", True)


def test_both_layouts_give_one_bundle(hugging_face: Path, ofa_sys: Path, tmp_path: Path) -> None:
    first = export_bundle(str(hugging_face), tmp_path / "first")
    second = export_bundle(str(ofa_sys), tmp_path / "second")
    assert first.fingerprint == second.fingerprint
    for name in ("image.onnx", "text.onnx", "tokenizer.json"):
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes()


def test_texts_may_be_cut_to_the_longest(hugging_face: Path) -> None:
    loaded = load_model(str(hugging_face))
    short = torch.from_numpy(Tokenizer(loaded.tokenizer_json, loaded.text)(TEXTS))
    padded = torch.nn.functional.pad(short, (0, 52 - short.shape[1]))
    with torch.inference_mode():
        rows = [loaded.model.encode_text(ids, normalize=True) for ids in (short, padded)]
    torch.testing.assert_close(*rows, rtol=0, atol=1e-6)


def test_a_resnet_in_half(tmp_path: Path) -> None:
    """The fifth size has a ResNet; published weights are partly half."""
    config: dict[str, Any] = {
        "family": chinese.FAMILY,
        "embed_dim": 32,
        "vision": {"image_size": 64, "width": 8, "layers": [1, 2, 1, 1], "heads": 4},
        "text": {
            "vocab_size": len(WORDS),
            "hidden_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 256,
            "max_position_embeddings": 64,
            "type_vocab_size": 2,
            "layer_norm_eps": 1e-12,
        },
    }
    torch.manual_seed(0)
    model = ChineseClip(config).eval().half()
    write_checkpoint(model, tmp_path / "clip_cn_rn.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    loaded = load_model(str(tmp_path / "clip_cn_rn.pt"))
    assert loaded.config == config
    assert loaded.name == "Chinese-CLIP RN17"
    assert {value.dtype for value in loaded.model.parameters()} == {torch.float32}
    pixels = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.model.encode_image(pixels), model.float().encode_image(pixels))
    bundle = export_bundle(str(tmp_path / "clip_cn_rn.pt"), tmp_path / "bundle")
    assert json.loads((bundle.path / "verify.json").read_text())["image"]["min_cosine"] > 0.999999


def test_a_run_that_began_with_it_loads_again(hugging_face: Path, tmp_path: Path) -> None:
    loaded = load_model(str(hugging_face))
    RunFolder.create(tmp_path / "run", {"seed": 1}, loaded).save(loaded, "best")
    again = load_model(str(tmp_path / "run"))
    assert again.config == loaded.config
    pixels = torch.rand(1, 3, 64, 64)
    assert torch.equal(again.model.encode_image(pixels), loaded.model.encode_image(pixels))
    assert all(parameter.requires_grad for parameter in again.model.parameters())


@pytest.mark.parametrize(
    ("size", "name", "heads"),
    [((768, 16, 224), "ViT-B-16", 12), ((1024, 14, 336), "ViT-L-14-336", 16), ((1280, 14, 224), "ViT-H-14", 16)],
)
def test_the_published_sizes_by_their_shapes(size: tuple[int, int, int], name: str, heads: int) -> None:
    width, patch, pixels = size
    with torch.device("meta"):
        state = {
            "bert.embeddings.word_embeddings.weight": torch.empty(21128, 768),
            "bert.embeddings.position_embeddings.weight": torch.empty(512, 768),
            "bert.embeddings.token_type_embeddings.weight": torch.empty(2, 768),
            "bert.encoder.layer.0.intermediate.dense.weight": torch.empty(3072, 768),
            "visual.conv1.weight": torch.empty(width, 3, patch, patch),
            "visual.positional_embedding": torch.empty((pixels // patch) ** 2 + 1, width),
            "visual.transformer.resblocks.0.mlp.c_fc.weight": torch.empty(4 * width, width),
            "text_projection": torch.empty(768, 512),
        }
    config = chinese._describe(state, {})
    assert chinese._name(config) == f"Chinese-CLIP {name}"
    assert config["vision"]["heads"] == heads
    assert config["text"]["num_attention_heads"] == 12


def test_token_ids_of_chinese_clip(shared_data: Path) -> None:
    folder = shared_data / "tokenizers"
    vocabulary = (folder / "chinese_clip_vocab.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
    tokenizer = Tokenizer(wordpiece_tokenizer_json(vocabulary), TextSpec(200, "none"))
    lines = (folder / "chinese_clip_vectors.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) > 1000
    for vector in map(json.loads, lines):
        assert tokenizer([vector["text"]])[0].tolist() == vector["ids"], vector["text"]


def basic_tokens(text: str) -> list[str]:
    """BERT's published rules, by Python's own Unicode tables."""

    def chinese_character(c: str) -> bool:
        return any(low <= ord(c) <= high for low, high in CJK)

    kept = [c for c in text if c in "\t\n\r" or (c not in "\0\ufffd" and unicodedata.category(c) not in ("Cc", "Cf"))]
    blanks = [" " if c in "\t\n\r" or unicodedata.category(c) == "Zs" else c for c in kept]
    spaced = "".join(f" {c} " if chinese_character(c) else c for c in blanks)
    found: list[str] = []
    for word in spaced.split():
        plain = "".join(c for c in unicodedata.normalize("NFD", word.lower()) if unicodedata.category(c) != "Mn")
        found += re.sub(f"([{re.escape(SIGNS)}])", r" \1 ", plain).split()
    return found


CJK = [(0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F)]
CJK += [(0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)]
SIGNS = "".join(
    chr(c)
    for c in range(0x110000)
    if unicodedata.category(chr(c)).startswith("P") or (33 <= c < 127 and not chr(c).isalnum())
)


@settings(max_examples=400, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=12))
def test_words_are_cut_as_bert_cuts_them(text: str) -> None:
    """Every word becomes one token: the vocabulary is made of the very words that the rules give."""
    words = basic_tokens(text)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *dict.fromkeys(words)]
    tokenizer = SPLITTER
    found = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))]
    assert found == words, (text, vocabulary)


def _splitter() -> Any:
    import tokenizers

    return tokenizers.Tokenizer.from_str(wordpiece_tokenizer_json(["[PAD]", "[UNK]", "[CLS]", "[SEP]"]))


SPLITTER = _splitter()


def test_long_words_and_odd_signs() -> None:
    tokenizer = Tokenizer(wordpiece_tokenizer_json(WORDS), TextSpec(52, "none"))
    assert tokenizer(["Reds!车ABC"])[0].tolist() == [
        WORDS.index(token) for token in ("[CLS]", "red", "##s", "!", "车", "[UNK]", "[SEP]")
    ]
    assert tokenizer(["a" + "b" * 250])[0].tolist() == [2, 1, 3]  # longer than 200: unknown as a whole
    assert len(tokenizer(["车" * 80])[0]) == 52
    np.testing.assert_array_equal(tokenizer(["車", "车"])[:, 1], [1, WORDS.index("车")])


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("code of the checkpoint ran",))


def test_bad_files_are_said_in_one_line(
    hugging_face: Path, ofa_sys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    content = ofa_sys.read_bytes()

    def refuse(name: str, match: str) -> None:
        with pytest.raises(ClipretError, match=match) as caught:
            load_model(str(tmp_path / name))
        assert "\n" not in str(caught.value)

    (tmp_path / "truncated.pt").write_bytes(content[: len(content) // 2])
    refuse("truncated.pt", "cannot be loaded")
    torch.save({"state_dict": {"module.bert.embeddings.word_embeddings.weight": Evil()}}, tmp_path / "evil.pt")
    refuse("evil.pt", "could run code")
    assert capsys.readouterr().out == ""
    (tmp_path / "alone.pt").write_bytes(content)
    monkeypatch.setattr(chinese, "hf_hub_download", lambda *_: 1 / 0)
    refuse("alone.pt", r"no vocab\.txt")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n")
    refuse("alone.pt", "4 entries and its table")
    stored = torch.load(ofa_sys, weights_only=True)
    del stored["state_dict"]["module.visual.ln_post.weight"]
    torch.save(stored, tmp_path / "lacks.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    refuse("lacks.pt", r"first is visual\.ln_post\.weight")
    crop = tmp_path / "crop"
    crop.mkdir()
    for file in hugging_face.iterdir():
        (crop / file.name).write_bytes(file.read_bytes())
    (crop / "preprocessor_config.json").write_text(json.dumps({"size": 64, "do_center_crop": True}))
    refuse("crop", "crop: True")
    (crop / "preprocessor_config.json").unlink()
    assert load_model(str(crop)).image.resize == "squash"
    (crop / "model.safetensors").unlink()
    refuse("crop", "no weights")
