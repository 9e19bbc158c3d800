"""Routers, one paper's idea per file, and presets named after papers."""

from moekit.routers.choices import AllChoices, LaterChoices, RandomChoice, SampledChoice, ThresholdChoice
from moekit.routers.exploration import Exploration, InputDropout, InputJitter, SampledSoftmax
from moekit.routers.overflow import NoTokenLeftBehind
from moekit.routers.presets import gshard, st_moe, switch, zcode_m3
from moekit.routers.topk import Balance, TopKRouter

__all__ = [
    "AllChoices",
    "Balance",
    "Exploration",
    "InputDropout",
    "InputJitter",
    "LaterChoices",
    "NoTokenLeftBehind",
    "RandomChoice",
    "SampledChoice",
    "SampledSoftmax",
    "ThresholdChoice",
    "TopKRouter",
    "gshard",
    "st_moe",
    "switch",
    "zcode_m3",
]
