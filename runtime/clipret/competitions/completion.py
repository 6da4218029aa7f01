"""Completion: a model fills in attributes that captions leave out, where it is reliable.

Half of the captions of the traffic challenge name colour and brand, half the type; its queries name all three. A model
trained on these captions fills the gaps by zero-shot classification over the vocabulary, and the next training learns
from full captions ("self-enhancement" in a published solution). Wrong words would be learnt too, so there are three
reasons to leave a word out. They are calibrated on the images whose word is known, each predicted as if it were not:

    unsure      the softmax over the vocabulary is below the threshold at which the known images reach the required
                precision
    unfamiliar  the image is less similar to the known images of the word than a given share of them are. A silver car
                is no further from its nearest word than a dark blue one, but it is unlike all blue cars. Of real cars
                in two colours that no caption named, 41 % were filled with this rule and 67 % by confidence alone,
                where both filled 93 % of the others
    other       a word outside the vocabulary (silver) fits better; for models that know such words

Image embeddings come from the gallery, so only texts are encoded.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import msgspec
import numpy as np
import numpy.typing as npt

from clipret.arrays import Floats, Ids, Mask
from clipret.errors import ClipretError
from clipret.inference.encoder import Encoder
from clipret.ranking.embedding_shards import EmbeddingShards
from clipret.schema import checked

__all__ = ["Guess", "SlotReport", "Vocabulary", "complete_slot", "fill_in"]


_Word = Annotated[str, msgspec.Meta(pattern=r"^\S(.*\S)?$")]

_NEAREST = 5  # known images that an image is compared with; from 1 to 20 it makes no difference (measured)
_LEAST = 20  # known images on which a precision may rest
_ROWS = 4096  # images at a time
_SCORES = 1 << 22  # similarities at a time: 32 MiB


class Vocabulary(msgspec.Struct, frozen=True):
    """The words of each attribute ("slot"), and further words that an image may show and no caption names."""

    slots: dict[str, tuple[_Word, ...]]
    other: dict[str, tuple[_Word, ...]] = {}

    @classmethod
    def read(cls, path: Path) -> Self:
        """From a JSON file {"slots": {"color": ["black", …], …}, "other": {"color": ["silver"]}}; further keys are
        passed over. Raises ClipretError."""
        try:
            made = checked(json.loads(path.read_bytes()), cls)
        except OSError as error:
            raise ClipretError(f"{path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ClipretError(
                f'{path} is no vocabulary ({error}): it needs {{"slots": {{"color": ["black", …], …}}}}; '
                "clipret-train data traffic writes one"
            ) from error
        for slot in made.other:
            if slot not in made.slots:
                raise ClipretError(f"{path} has other words of {slot!r}, which is none of its slots: add it to slots")
        for slot, words in made.slots.items():
            for word, count in Counter((*words, *made.other.get(slot, ()))).items():
                if count > 1:
                    raise ClipretError(f"{path} has the word {word!r} of {slot!r} twice: remove one")
        return made


@dataclass(frozen=True)
class Guess:
    """The prediction for one image.

    Attributes:
        word: The word.
        confidence: Its share of the softmax.
        familiarity: How familiar the image is.
        refused: Why it was not filled in; "" if it was.
    """

    word: str
    confidence: float
    familiarity: float
    refused: str  # "", "unsure", "unfamiliar", "other"


@dataclass(frozen=True)
class SlotReport:
    """How a slot was completed. Shares are 0 to 1; `precision` and `coverage` are of the known images that calibrate.

    accuracy: of the bare choice, before any refusal. threshold: of the confidence; infinite where the precision asked
    for is out of reach and nothing is filled. sure: the known images on which `precision` rests; of 24 images with
    one wrong it may as well be 80 % as 99 %. rare: words that too few images have to be filled in.
    """

    slot: str
    known: int
    accuracy: float
    threshold: float
    precision: float
    sure: int
    coverage: float
    missing: int
    filled: int
    unsure: int
    unfamiliar: int
    other: int
    words: dict[str, int]
    rare: tuple[str, ...]


def complete_slot(
    rows: EmbeddingShards,
    positions: Ids,
    values: Sequence[Mapping[str, str]],
    slot: str,
    vocabulary: Vocabulary,
    encoder: Encoder,
    templates: Sequence[str],
    *,
    precision: float = 0.95,
    unfamiliar: float = 0.1,
    among: Mask | None = None,
    calibrate: Mask | None = None,
) -> tuple[SlotReport, dict[int, Guess]]:
    """Predict the missing words of one slot.

    Args:
        rows: The embeddings of the gallery.
        positions: The position of each image's embedding, int64 [P].
        values: The known words of each image by slot, [P]; "" or absent if unknown.
        slot: The slot to fill.
        vocabulary: The words of each slot.
        encoder: Of the gallery's model.
        templates: With slots in braces, such as "a photo of a {color} {brand} {type}". Slots that an image lacks are
            left out, and the embeddings of all templates with the slot are averaged.
        precision: The required share of right words.
        unfamiliar: The share of the known images of a word that would be refused as unfamiliar; 0 refuses none.
        among: The images to fill, bool [P]. Default: all.
        calibrate: The known images to calibrate on, bool [P], preferably images that the model was not trained on.
            Default: all.

    Returns:
        A report, and the predictions by their position in `values`.

    Raises:
        ClipretError: Too few images are known, or a known word is not in the vocabulary.
    """
    words = vocabulary.slots[slot]
    every = (*words, *vocabulary.other.get(slot, ()))
    number = {word: at for at, word in enumerate(words)}
    own = [value.get(slot, "") for value in values]
    for word in own:
        if word and word not in number:
            raise ClipretError(f"{slot} {word!r} is not in the vocabulary ({', '.join(words)}): add it there")
    truth = np.array([number.get(word, -1) for word in own], dtype=np.int64)
    known = truth >= 0
    used = known if calibrate is None else known & calibrate
    if used.sum() < _LEAST:
        raise ClipretError(
            f"{int(used.sum())} images have a {slot} to calibrate with, {_LEAST} are the least: label more"
        )
    wanted = ~known if among is None else ~known & among
    asked = np.flatnonzero(known | wanted)
    guess, confidence = np.full(len(values), -1), np.zeros(len(values))
    for places, texts in _by_context(values, asked, slot, every, templates):
        scores = _shares(rows, positions[places], texts, encoder)
        guess[places], confidence[places] = scores.argmax(axis=1), scores.max(axis=1)
    familiarity, limit = _familiarities(rows, positions, guess, truth, asked, len(words), unfamiliar)
    within = familiarity >= limit[guess]  # of the other words nothing is known: no familiarity reaches infinity
    threshold, reached = _threshold(confidence, within & used, guess == truth, precision)
    sure = within & (confidence >= threshold)
    guesses = {}
    for at in np.flatnonzero(wanted).tolist():
        reason = "unfamiliar" if not within[at] else "unsure" if confidence[at] < threshold else ""
        reason = "other" if guess[at] >= len(words) else reason
        guesses[at] = Guess(every[guess[at]], float(confidence[at]), float(familiarity[at]), reason)
    refused = Counter(one.refused for one in guesses.values())
    report = SlotReport(
        slot=slot,
        known=int(used.sum()),
        accuracy=float((guess == truth)[used].mean()),
        threshold=float(threshold),
        precision=reached,
        sure=int(sure[used].sum()),
        coverage=float(sure[used].mean()),
        missing=len(guesses),
        filled=refused[""],
        unsure=refused["unsure"],
        unfamiliar=refused["unfamiliar"],
        other=refused["other"],
        words=dict(Counter(one.word for one in guesses.values() if not one.refused).most_common()),
        rare=tuple(word for at, word in enumerate(words) if np.isposinf(limit[at])),
    )
    return report, guesses


def fill_in(template: str, values: Mapping[str, str]) -> str:
    """A template with its slots filled in, without double spaces where a value is missing."""
    return " ".join(re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], ""), template).split())


def _by_context(
    values: Sequence[Mapping[str, str]], asked: Ids, slot: str, words: Sequence[str], templates: Sequence[str]
) -> Iterator[tuple[Ids, list[list[str]]]]:
    """Images of which the same is known, and for each word the texts that name it."""
    naming = [template for template in templates if f"{{{slot}}}" in template]
    if not naming:
        raise ClipretError(f"no template names {{{slot}}}: add one, such as {{{slot}}} car")
    named = sorted({name for template in naming for name in re.findall(r"\{(\w+)\}", template)} - {slot})
    groups = defaultdict[tuple[str, ...], list[int]](list)
    for at in asked.tolist():
        groups[tuple(values[at].get(name, "") for name in named)].append(at)
    for context, places in groups.items():
        filled = dict(zip(named, context, strict=True))
        texts = [[fill_in(template, {**filled, slot: word}) for template in naming] for word in words]
        yield np.array(places), texts


def _shares(rows: EmbeddingShards, positions: Ids, texts: Sequence[Sequence[str]], encoder: Encoder) -> Floats:
    """The softmax over the words [n,V] of each image's similarities to the mean of each word's texts."""
    encoded = encoder.encode_texts([text for some in texts for text in some]).astype(np.float64)
    means = encoded.reshape(len(texts), -1, encoded.shape[1]).mean(axis=1)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    shares = np.empty((len(positions), len(texts)))
    for low in range(0, len(positions), _ROWS):
        heat = encoder.bundle.manifest.logit_scale * _take(rows, positions[low : low + _ROWS]) @ means.T
        heat = np.exp(heat - heat.max(axis=1, keepdims=True))
        shares[low : low + len(heat)] = heat / heat.sum(axis=1, keepdims=True)
    return shares


def _familiarities(
    rows: EmbeddingShards, positions: Ids, guess: Ids, truth: Ids, asked: Ids, words: int, unfamiliar: float
) -> tuple[Floats, Floats]:
    """How familiar each image is, [P]: the mean similarity to the nearest known images of the word it was given,
    other than itself; and the least that counts for each word and each other word, infinite where nothing does."""
    familiarity = np.full(len(guess), -np.inf)
    limit = np.full(max(words, int(guess.max()) + 1), np.inf)
    limit[:words] = np.inf if unfamiliar else -np.inf
    for word in range(words):
        named = np.flatnonzero(truth == word)
        if len(named) <= _NEAREST:
            continue
        examples = _take(rows, positions[named])
        mine = asked[guess[asked] == word]
        step = max(1, _SCORES // len(named))
        for low in range(0, len(mine), step):
            part = mine[low : low + step]
            near = _take(rows, positions[part]) @ examples.T
            near[positions[part][:, None] == positions[named][None]] = -np.inf
            nearest = np.partition(near, len(named) - _NEAREST, axis=1)[:, len(named) - _NEAREST :]
            familiarity[part] = nearest.mean(axis=1)
        right = familiarity[named[guess[named] == word]]
        if len(right) and unfamiliar:
            limit[word] = np.quantile(right, unfamiliar)
    return familiarity, limit


def _threshold(confidence: Floats, usable: Mask, right: Mask, precision: float) -> tuple[float, float]:
    """The lowest confidence from which a share `precision` of the usable predictions is right, and that share."""
    order = np.flatnonzero(usable)
    order = order[np.argsort(-confidence[order], kind="stable")]
    if len(order) < _LEAST:
        return float("inf"), 0.0
    share = np.cumsum(right[order]) / np.arange(1, len(order) + 1)
    last = np.append(confidence[order][1:] < confidence[order][:-1], True)  # of equal ones all or none
    good = np.flatnonzero(last & (share >= precision) & (np.arange(1, len(order) + 1) >= _LEAST))
    if not len(good):
        return float("inf"), 0.0
    return float(confidence[order[good[-1]]]), float(share[good[-1]])


def _take(rows: EmbeddingShards, positions: Ids) -> npt.NDArray[Any]:
    order = np.argsort(positions, kind="stable")
    taken = np.empty((len(positions), rows.shards[0].shape[1]))
    taken[order] = rows.take(positions[order])
    return taken
