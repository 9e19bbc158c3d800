"""Routers, one paper's idea per file, and presets named after papers."""

from moekit.routers.choices import AllChoices, LaterChoices, RandomChoice, SampledChoice, ThresholdChoice
from moekit.routers.cosine import CosineRouter
from moekit.routers.expert_choice import ExpertChoiceRouter
from moekit.routers.exploration import Exploration, InputDropout, InputJitter, SampledSoftmax
from moekit.routers.overflow import NoTokenLeftBehind
from moekit.routers.presets import gshard, st_moe, switch, zcode_m3
from moekit.routers.sinkhorn import SinkhornRouter
from moekit.routers.task import TaskRouter, TaskTableRouter
from moekit.routers.topk import Balance, TopKRouter
from moekit.routers.uniform import UniformRouter

__all__ = [
    "AllChoices",
    "Balance",
    "CosineRouter",
    "ExpertChoiceRouter",
    "Exploration",
    "InputDropout",
    "InputJitter",
    "LaterChoices",
    "NoTokenLeftBehind",
    "RandomChoice",
    "SampledChoice",
    "SampledSoftmax",
    "SinkhornRouter",
    "TaskRouter",
    "TaskTableRouter",
    "ThresholdChoice",
    "TopKRouter",
    "UniformRouter",
    "gshard",
    "st_moe",
    "switch",
    "zcode_m3",
]
