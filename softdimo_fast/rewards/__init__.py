"""Rewards: differentiable scores of images that a generator, or a search at test time, maximises.

Importing this package costs torch alone.
"""

from softdimo_fast.rewards.classifier import ClassifierReward
from softdimo_fast.rewards.protocol import Reward
from softdimo_fast.rewards.weighted import WeightedRewards

__all__ = ["ClassifierReward", "Reward", "WeightedRewards"]
