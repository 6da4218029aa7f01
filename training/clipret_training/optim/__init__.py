"""Optimizers, learning rate schedules, and averages of weights."""

from clipret_training.optim.averaging import MovingAverage, Soup, greedy_soup, interpolate, uniform_soup
from clipret_training.optim.optimizer import make_optimizer
from clipret_training.optim.schedule import learning_rate

__all__ = ["MovingAverage", "Soup", "greedy_soup", "interpolate", "learning_rate", "make_optimizer", "uniform_soup"]
