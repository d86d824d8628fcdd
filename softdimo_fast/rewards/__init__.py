"""Rewards: differentiable scores of images that a generator, or a search at test time, maximises.

Importing this package costs torch alone.
"""

from softdimo_fast.rewards.classifier import ClassifierReward
from softdimo_fast.rewards.clip import (
    ClipReward,
    HpsReward,
    ImageRewardReward,
    PickScoreReward,
    reno_rewards,
)
from softdimo_fast.rewards.prompted import PromptedReward
from softdimo_fast.rewards.protocol import Reward
from softdimo_fast.rewards.weighted import WeightedRewards

__all__ = [
    "ClassifierReward",
    "ClipReward",
    "HpsReward",
    "ImageRewardReward",
    "PickScoreReward",
    "PromptedReward",
    "Reward",
    "WeightedRewards",
    "reno_rewards",
]
