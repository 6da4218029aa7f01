from pathlib import Path

import torch

from clipret.inference.tokenizer import Tokenizer
from clipret.pairs import PairSet
from clipret_training.annotations import Annotations
from clipret_training.data.attributes import Attributes
from clipret_training.models.load import load_model

TITLES = ("a red car", "a vehicle in red", "a blue car", "something", "a red bus")
PAIRS = PairSet((Path("a"), Path("b"), Path("c"), Path("d")), TITLES, ((0, 1), (2,), (3,), (4,)))


def attributes() -> tuple[Attributes, Tokenizer]:
    loaded = load_model("clipret-small", captions=TITLES * 20)
    return Attributes(loaded, Annotations(PAIRS, ((),) * 4), None), Tokenizer(loaded.tokenizer_json, loaded.text)


def test_swapped_captions_are_new_and_known_ones_keep_their_key() -> None:
    made, tokenizer = attributes()
    captions, owners = torch.tensor([0, 2, 3]), torch.tensor([0, 1, 2])
    seen = set()
    for seed in range(60):
        ids, keys = made.negatives([0, 1, 2], captions, owners, torch.Generator().manual_seed(seed))
        assert 1 <= len(ids) == len(keys) <= 2  # "something" has nothing to swap, and both cars may turn green
        for row, key in zip(ids, keys[:, 0].tolist(), strict=True):
            if key >= 0:
                known = torch.from_numpy(tokenizer([TITLES[key]]))[0]
                assert torch.equal(row[row > 0], known)
            seen.add(key)
    assert seen <= {-1, 0, 2, 4}
    assert {0, 2} & seen  # red became blue or blue red: captions of other images


def test_no_attribute_no_negative() -> None:
    made, _ = attributes()
    ids, keys = made.negatives([2], torch.tensor([3]), torch.tensor([0]), torch.Generator())
    assert ids.shape == keys.shape == (0, 1)


def test_an_image_has_the_attributes_of_all_its_captions() -> None:
    made, _ = attributes()
    images, captions = made.of([0, 1, 2], torch.tensor([0, 1, 2, 3]))
    assert torch.equal(images[0], captions[0] | captions[1])
    assert (images[0] & images[1]).sum() == 1  # the car
    assert images[2].sum() == 0
