"""The batches of a training: images decoded and augmented, captions tokenized, hard negatives added."""

from clipret_training.data.batches import Batch, ImageReader, Texts, normalise
from clipret_training.data.training_data import TrainingData, open_held_out

__all__ = ["Batch", "ImageReader", "Texts", "TrainingData", "normalise", "open_held_out"]
