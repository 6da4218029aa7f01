import json
from pathlib import Path

import numpy as np
import pytest
import torch

from clipret.errors import ClipretError
from clipret_training.data.negatives import AttributeSwap
from clipret_training.loss import attribute_overlap
from clipret_training.synthetic.scene import Scene
from clipret_training.synthetic.words import LANGS
from clipret_training.synthetic.words import captions as drawn_captions


@pytest.fixture(scope="module")
def swap() -> AttributeSwap:
    return AttributeSwap.read()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def all_of(swap: AttributeSwap, caption: str, *positives: str) -> set[str]:
    found = {swap(caption, positives, generator(seed)) for seed in range(300)}
    return {text for text in found if text is not None}


@pytest.mark.parametrize(
    ("caption", "expected", "never"),
    [
        ("a red car", {"a blue car", "an orange car", "a red bus"}, {"a orange car", "a red car"}),
        ("An orange bus", {"A red bus", "An orange truck"}, {"An red bus"}),
        ("two cars turn left", {"two buses turn left", "two cars turn right"}, {"two bus turn left"}),
        ("three women in hats", {"three men in hats", "three women in caps"}, {"three mans in hats"}),
        ("Red cars", {"Blue cars", "Red vans"}, {"blue cars"}),
        ("a gray van", {"a white van"}, {"a silver van", "a grey van"}),  # the same colour by other names
        ("a scarred carpet", set(), {"a sbluered carpet"}),
        ("waiting at a red light", set(), {"waiting at a blue light"}),
        ("a sedan on the street", {"an SUV on the street", "a sedan on the beach"}, {"a SUV on the street"}),
        ("一辆红色的轿车", {"一辆蓝色的轿车", "一辆红色的卡车"}, {"一辆银色的轿车"}),
        ("左侧有穿白衣的男人", {"右边有穿白衣的男人", "左侧有穿黑衣的男人", "左侧有穿白衣的女人"}, set()),
        ("马路上的斑马线", set(), {"牛路上的斑马线"}),
        ("穿牛仔裤的女孩", {"穿短裤的女孩", "穿牛仔裤的男孩"}, {"穿马仔裤的女孩"}),
    ],
)  # fmt: skip
def test_one_attribute_is_swapped(swap: AttributeSwap, caption: str, expected: set[str], never: set[str]) -> None:
    found = all_of(swap, caption, caption)
    assert expected <= found
    assert not never & found
    if not expected:
        assert not found


def test_no_caption_of_the_same_image_comes_out(swap: AttributeSwap) -> None:
    """Neither word for word nor by what the others name."""
    found = all_of(swap, "a dog on the grass", "a dog on the grass", "A cat  on the grass", "a black animal")
    assert found
    assert not {text for text in found if "cat" in text or "black" in text}
    tiny = AttributeSwap({"colour": [["red"], ["blue"]]})
    assert tiny("a red car", [], generator()) == "a blue car"
    assert tiny("a red car", ["A  BLUE car"], generator()) is None
    assert tiny("a red car and a blue car", [], generator()) is None
    assert tiny("a car", [], generator()) is None


def test_the_generator_decides(swap: AttributeSwap) -> None:
    caption = "a young man in a red jacket on the left"
    first = [swap(caption, [], generator(seed)) for seed in range(20)]
    assert first == [swap(caption, [], generator(seed)) for seed in range(20)]
    assert len(set(first)) > 5


def test_attributes_are_what_soft_labels_need(swap: AttributeSwap) -> None:
    table = swap.attributes(["a grey car", "Silver CARS", "a grey bus", "nothing of the kind", "一辆灰色的轿车"])
    assert table.sum(dim=1).tolist() == [2, 2, 2, 0, 2]
    assert torch.equal(table[0], table[1])
    assert (table[0] & table[2]).sum() == 1
    assert not (table[0] & table[4]).any()  # the languages have groups of their own
    overlap = attribute_overlap(table[:1], table)
    assert overlap[0].tolist() == pytest.approx([1, 1, 1 / 3, 0, 0])


def test_a_file_adds_words(tmp_path: Path) -> None:
    file = tmp_path / "more.json"
    file.write_text(json.dumps({
        "groups": {"colour": [["maroon"], ["blue", "navy blue"]], "brand": [["Audi"], ["BMW"]]},
        "keep": ["green field"],
    }))  # fmt: skip
    swap = AttributeSwap.read(file)
    assert "a maroon car" in all_of(swap, "a red car")
    assert "a navy blue car" not in all_of(swap, "a blue car")
    assert all_of(swap, "an Audi in a green field") == {"a BMW in a green field"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "expected object, got array"),
        ('{"colours": []}', "contains unknown field colours"),
        ('{"groups": {"colour": ["red", "blue"]}}', r"groups\.colour\[0\] is 'red': expected array"),
        ('{"groups": {"colour": [[]]}}', r"groups\.colour\[0\] is \[\]: expected array of length >= 1; write as"),
        ('{"groups": ["colour"]}', r"groups is \['colour'\]: expected object"),
        ('{"groups": {"paint": [["red"], ["beige"]]}}', "'red' is in the groups colour and paint"),
    ],
)
def test_a_file_that_is_no_vocabulary(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "more.json"
    file.write_text(content)
    with pytest.raises(ClipretError, match=message):
        AttributeSwap.read(file)


@pytest.mark.parametrize("real", [False, True])
def test_captions_in_both_languages(real: bool, swap: AttributeSwap, real_data: Path | None) -> None:
    """Most have something to swap, and no image gets one of its own captions for a negative."""
    of_image: dict[tuple[str, str], list[str]] = {}
    if real and real_data is not None:
        for line in (real_data / "flickr8k" / "captions.tsv").read_text(encoding="utf-8").splitlines()[1:]:
            path, _, lang, caption = line.split("\t")
            of_image.setdefault((path, lang), []).append(caption)
    else:
        rng = np.random.default_rng(0)
        scenes = [Scene.sample(rng) for _ in range(600)]
        of_image = {(str(n), lang): drawn_captions(s, rng, lang, 3) for n, s in enumerate(scenes) for lang in LANGS}
    made = {"en": 0, "zh": 0}
    seen = {"en": 0, "zh": 0}
    for (_, lang), captions in list(of_image.items())[::21]:
        for number, caption in enumerate(captions):
            negative = swap(caption, captions, generator(number))
            seen[lang] += 1
            made[lang] += negative is not None
            assert negative not in captions
    assert made["en"] > 0.7 * seen["en"]
    assert made["zh"] > 0.4 * seen["zh"]
