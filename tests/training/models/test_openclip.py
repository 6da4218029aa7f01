"""Models of open_clip with towers and tokenizers of other libraries, as tiny folders with random weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from open_clip.tokenizer import get_clean_fn
from safetensors.torch import save_file
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as HubTokenizer
from transformers import AutoConfig, PreTrainedTokenizerFast

from clipret.bundle import ImageSpec, TextSpec
from clipret.errors import ClipretError
from clipret.inference.tokenizer import CleanName, Tokenizer, clean
from clipret_training.models import hub_tokenizer
from clipret_training.models.load import describe, load_model

TEXTS = [
    "A red car",
    "Two DOGS; one cat &amp;amp; 3 birds, isn't it?",
    "café Straße 一辆红色的车 \U0001f697",
    "snake_case <s> </s> [SEP] <pad>",
    "the quick brown fox jumps over the lazy dog " * 9,
]
CORPUS = ["a red car and a blue truck", "two dogs run on a beach", "the quick brown fox jumps over the lazy dog"] * 20
VISION = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
TEXT = {"width": 32, "heads": 2, "layers": 2}


def sentencepiece_like(specials: list[str], template: str) -> HubTokenizer:
    """Unigram over words marked with ▁, as T5, mT5 and XLM-RoBERTa have."""
    tokenizer = HubTokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=specials, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    pairs = [(token, tokenizer.token_to_id(token)) for token in specials if token in template]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=pairs)
    return tokenizer


def t5_like() -> PreTrainedTokenizerFast:
    inner = sentencepiece_like(["<pad>", "</s>", "<unk>"], "$A </s>")
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="</s>", eos_token="</s>", unk_token="<unk>")


def roberta_like() -> PreTrainedTokenizerFast:
    inner = sentencepiece_like(["<s>", "<pad>", "</s>", "<unk>"], "<s> $A </s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
    )


def bert_like() -> PreTrainedTokenizerFast:
    inner = HubTokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    inner.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=90, special_tokens=specials, show_progress=False)
    )
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes an open_clip folder: configuration, tokenizer, random weights."""

    def make_folder(
        text_cfg: dict[str, Any], tokenizer: PreTrainedTokenizerFast | None = None, **model_cfg: Any
    ) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
            text_cfg = {"hf_tokenizer_name": "somebody/something", **text_cfg}
        config = {"model_cfg": {"embed_dim": 16, "vision_cfg": VISION, **model_cfg, "text_cfg": text_cfg}}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        return folder

    return make_folder


def with_weights(folder: Path, hf_model: dict[str, Any] | None = None) -> torch.nn.Module:
    """Write random weights for the model of a folder and return it; `hf_model` configures its text tower."""
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    if hf_model is not None:
        text_model = folder / config["text_cfg"]["hf_model_name"]
        AutoConfig.for_model(**hf_model).save_pretrained(text_model)
        config["text_cfg"] |= {"hf_model_name": str(text_model), "hf_model_pretrained": False}
    torch.manual_seed(3)
    custom = config.pop("custom_text", False) or hf_model is not None
    kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP if custom else open_clip.CLIP
    model = kind(**config).eval()
    with torch.no_grad():  # the usual random weights are so small that all texts get nearly the same embedding
        for parameter in model.text.parameters() if custom else model.transformer.parameters():
            parameter.mul_(5 if parameter.ndim > 1 else 1)
    state = {key: value.clone().contiguous() for key, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return model


def check_against_open_clip(folder: Path, reference: torch.nn.Module, pad_to: str) -> None:
    """Compare ids and embeddings of a folder with those of open_clip, in batches of several sizes."""
    loaded = load_model(str(folder))
    theirs = open_clip.get_tokenizer(f"local-dir:{folder}")
    assert loaded.text.pad_to == pad_to
    full = Tokenizer(loaded.tokenizer_json, replace(loaded.text, pad_to="context"))
    np.testing.assert_array_equal(full(TEXTS), theirs(TEXTS).numpy())
    ours = Tokenizer(loaded.tokenizer_json, loaded.text)
    with torch.inference_mode():
        expected = reference.encode_text(theirs(TEXTS), normalize=False)
        assert expected.ndim == 2
        for embedding, text in zip(expected, TEXTS, strict=True):
            alone = loaded.model.encode_text(torch.from_numpy(ours([text])))[0]
            torch.testing.assert_close(alone, embedding, rtol=1e-4, atol=1e-5)
        pixels = torch.rand(2, 3, loaded.image.size, loaded.image.size)
        images = reference.encode_image(pixels, normalize=False)
        torch.testing.assert_close(loaded.model.encode_image(pixels), images, rtol=0, atol=1e-5)
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)


SIGLIP = {
    **TEXT,
    "context_length": 12,
    "vocab_size": 90,
    "no_causal_mask": True,
    "pool_type": "last",
    "proj_bias": True,
    "norm_kwargs": {"eps": 1e-6},
    "tokenizer_kwargs": {"clean": "canonicalize"},
}


def test_siglip(make: Make) -> None:
    vision = {"image_size": 32, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"}
    folder = make(SIGLIP, t5_like(), vision_cfg=vision, embed_dim=64, custom_text=True, init_logit_bias=-10)
    preprocess = {"mean": 0.5, "std": [0.5] * 3, "resize_mode": "squash", "interpolation": "random"}
    edit(folder / "open_clip_config.json", preprocess_cfg=preprocess)
    check_against_open_clip(folder, with_weights(folder), "context")
    loaded = load_model(str(folder))
    assert (loaded.mean, loaded.std) == ((0.5,) * 3, (0.5,) * 3)
    assert loaded.image == ImageSpec(32, "squash", "bicubic")
    assert loaded.text == TextSpec(12, "canonicalize", "context", pad_id=1)


HF_MODELS: dict[str, dict[str, Any]] = {
    "roberta": {
        "model_type": "roberta",
        "vocab_size": 90,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 24,
    },
    "mt5": {
        "model_type": "mt5",
        "vocab_size": 90,
        "d_model": 24,
        "d_ff": 32,
        "d_kv": 12,
        "num_layers": 2,
        "num_heads": 2,
        "pad_token_id": 1,
    },
    "m2m_100": {
        "model_type": "m2m_100",
        "vocab_size": 90,
        "d_model": 24,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "max_position_embeddings": 24,
        "pad_token_id": 1,
    },
}
HF_MODELS["xlm-roberta"] = HF_MODELS["roberta"] | {"model_type": "xlm-roberta"}
HF_TEXT = {"context_length": 16, "hf_model_name": "text"}


@pytest.mark.parametrize(
    ("kind", "pooler"),
    [("roberta", "mean_pooler"), ("xlm-roberta", "cls_pooler"), ("mt5", "mean_pooler"), ("m2m_100", "cls_pooler")],
)
def test_text_towers_of_transformers(make: Make, kind: str, pooler: str) -> None:
    tokenizer = t5_like() if kind == "mt5" else roberta_like()
    folder = make({**HF_TEXT, "hf_pooler_type": pooler, "hf_proj_type": "mlp"}, tokenizer)
    check_against_open_clip(folder, with_weights(folder, HF_MODELS[kind]), "longest")


def test_pads_that_a_text_tower_does_not_mask_forbid_short_texts(make: Make) -> None:
    folder = make({**HF_TEXT, "hf_pooler_type": "mean_pooler"}, t5_like())  # pads with 1
    check_against_open_clip(folder, with_weights(folder, HF_MODELS["mt5"] | {"pad_token_id": 0}), "context")


def test_a_run_of_such_a_model_needs_neither_hub_nor_folder(make: Make, tmp_path: Path) -> None:
    folder = make(HF_TEXT, roberta_like())
    with_weights(folder, HF_MODELS["xlm-roberta"])
    loaded = load_model(str(folder))
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for name, content in describe(loaded).items():
        (run / name).write_text(content, encoding="utf-8")
    save_file(loaded.model.state_dict(), run / "checkpoints" / "best.safetensors")
    shutil.rmtree(folder)
    again = load_model(str(run))
    ids = torch.from_numpy(Tokenizer(again.tokenizer_json, again.text)(TEXTS))
    assert again.text == loaded.text
    assert again.config == json.loads(json.dumps(loaded.config))
    assert torch.equal(again.model.encode_text(ids), loaded.model.encode_text(ids))


def test_clipa_has_zeros_for_separators(make: Make) -> None:
    text = {**TEXT, "context_length": 12, "vocab_size": 90, "no_causal_mask": True, "pool_type": "last"}
    folder = make({**text, "tokenizer_kwargs": {"strip_sep_token": True}}, bert_like())
    check_against_open_clip(folder, with_weights(folder), "context")


@pytest.mark.parametrize("custom", [False, True])
def test_causal_tower_that_pools_at_the_end_token(make: Make, custom: bool) -> None:
    text = {**TEXT, "context_length": 12, "vocab_size": 90, "pool_type": "eos", "eos_id": 2}
    folder = make(text, roberta_like(), custom_text=custom)
    check_against_open_clip(folder, with_weights(folder), "longest")


@pytest.mark.parametrize("custom", [False, True])
def test_a_pad_token_that_argmax_finds_forbids_short_texts(make: Make, custom: bool) -> None:
    tokenizer = roberta_like()
    tokenizer.add_special_tokens({"pad_token": "<last>"})
    folder = make({**TEXT, "context_length": 12, "vocab_size": 91}, tokenizer, custom_text=custom)
    check_against_open_clip(folder, with_weights(folder), "context")


def test_short_texts_are_measured(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipret_training.models.openclip._reads_one_token_causally", lambda _: True)
    folder = make({**TEXT, "context_length": 12, "pool_type": "last"}, custom_text=True)
    check_against_open_clip(folder, with_weights(folder), "context")


@pytest.mark.parametrize("causal", [True, False])
def test_custom_text_with_clips_own_tokenizer(make: Make, causal: bool) -> None:
    folder = make({**TEXT, "no_causal_mask": not causal}, custom_text=True)
    check_against_open_clip(folder, with_weights(folder), "longest" if causal else "context")


def test_coca(make: Make) -> None:
    text = {**TEXT, "context_length": 76, "embed_cls": True, "output_tokens": True}
    vision = {**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    multimodal = {**TEXT, "context_length": 76, "dim_head": 16, "n_queries": 8, "attn_pooler_heads": 2}
    folder = make(text, vision_cfg=vision, multimodal_cfg=multimodal, custom_text=True)
    check_against_open_clip(folder, with_weights(folder), "context")


def test_towers_that_also_return_their_tokens(make: Make) -> None:
    folder = make({**TEXT, "output_tokens": True}, vision_cfg={**VISION, "output_tokens": True}, custom_text=True)
    reference = with_weights(folder)
    reference.visual.output_tokens = reference.text.output_tokens = False
    check_against_open_clip(folder, reference, "longest")


@pytest.mark.parametrize(
    ("change", "text_cfg", "message"),
    [
        ({"padding_side": "left"}, {}, "pads and truncates on the left and right"),
        ({"truncation_side": "left"}, {}, "on the right and left"),
        ({"pad_token": None}, {}, "no pad token"),
        ({"split_special_tokens": True}, {}, "splits special tokens"),
        ({}, {"tokenizer_mode": "clips"}, "mode 'clips'"),
        ({}, {"tokenizer_kwargs": {"strip_sep_token": True}}, "Unigram"),
    ],
)
def test_tokenizers_that_a_bundle_cannot_hold(
    make: Make, change: dict[str, Any], text_cfg: dict[str, Any], message: str
) -> None:
    folder = make({**TEXT, **text_cfg}, roberta_like())
    edit(folder / "tokenizer_config.json", **change)
    with pytest.raises(ClipretError, match=message) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction_mask": "random"}, "drops words"),
        ({"additional_special_tokens": ["<x>"]}, "additional special tokens"),
        ({"clean": "whitespace"}, "without lower-casing"),
    ],
)
def test_variants_of_clips_tokenizer_that_a_bundle_cannot_hold(
    make: Make, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ClipretError, match=message):
        load_model(str(make({**TEXT, "tokenizer_kwargs": options})))


def test_clips_tokenizer_without_punctuation(make: Make) -> None:
    folder = make({**TEXT, "tokenizer_kwargs": {"clean": "canonicalize"}})
    check_against_open_clip(folder, with_weights(folder), "longest")


def test_other_ids_than_open_clips_are_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(TEXT, roberta_like())
    monkeypatch.setattr(hub_tokenizer.HFTokenizer, "__call__", lambda *_: torch.zeros(1, 77))
    with pytest.raises(ClipretError, match="other ids than open_clip for 'a red car'"):
        load_model(str(folder))


@pytest.mark.parametrize("source", ["ViT-B-16-SigLIP", "xlm-roberta-base-ViT-B-32"])
def test_a_tokenizer_on_a_hub_that_cannot_be_reached(
    source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ClipretError, match=rf"the tokenizer .+ of {source} cannot be loaded") as caught:
        load_model(source)
    assert "\n" not in str(caught.value)


def test_a_text_tower_that_cannot_be_found(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ClipretError, match="cannot be loaded") as caught:
        load_model(str(make({"hf_model_name": "nobody/nothing"}, roberta_like())))
    assert "\n" not in str(caught.value)


@settings(deadline=None, database=None)
@given(st.lists(st.text(max_size=4) | st.sampled_from(["&amp;", "&nbsp;", "â€™", "_", "'S", "İ", "ſ", "\ud800"])))
def test_clean_is_open_clips(parts: list[str]) -> None:
    text = "".join(parts)
    names: dict[CleanName, str] = {"clip": "lower", "whitespace": "whitespace", "canonicalize": "canonicalize"}
    for ours, theirs in names.items():
        assert clean(text, ours) == get_clean_fn(theirs)(text)
