"""Routers, one paper's idea per file, and presets named after papers."""

from moekit.routers.base_layers import BASELayerRouter, base_layers
from moekit.routers.cosine import CosineRouter, CosineScorer
from moekit.routers.dense_to_sparse import DenseToSparseRouter, ExponentialDecay, LinearDecay, dense_to_sparse
from moekit.routers.expert_choice import ExpertChoiceRouter
from moekit.routers.exploration import Exploration, InputDropout, InputJitter, SampledSoftmax
from moekit.routers.gating_residual import GatingResidual
from moekit.routers.hash import HashRouter
from moekit.routers.hash_keys import Bigram, CurrentToken, HashKey, NextToken, PreviousToken, TokenPosition
from moekit.routers.hash_presets import (
    hash_bigram,
    hash_clustered,
    hash_dispersed,
    hash_layers,
    hash_oracle,
    hash_position,
    hash_previous,
    hash_random,
    multi_hash,
)
from moekit.routers.hierarchical import HierarchicalRouter
from moekit.routers.loss_free import GroupLimit, LossFreeRouter, deepseek_v3, loss_free
from moekit.routers.noisy_topk import NoisyTopKRouter, noisy_topk
from moekit.routers.overflow import NoTokenLeftBehind
from moekit.routers.presets import gshard, st_moe, switch, zcode_m3
from moekit.routers.queueing import clear_padding, routing_of_choices
from moekit.routers.rank_shuffle import RankShuffle
from moekit.routers.relu import AdaptiveCoefficient, ReLURouter, remoe
from moekit.routers.scorers import BiasedLinearScorer, ExpertScorer, LinearScorer, ScoredRouter
from moekit.routers.second_expert import AllChoices, RandomChoice, SampledChoice, SecondExpertPolicy, ThresholdChoice
from moekit.routers.sequence_capacity import SequenceCapacity
from moekit.routers.sinkhorn import SinkhornRouter
from moekit.routers.sparse_mixer import SparseMixerRouter
from moekit.routers.task import TaskRouter, TaskScorer, TaskTableRouter
from moekit.routers.topk import Balance, TopKRouter
from moekit.routers.uniform import UniformRouter

__all__ = [
    "AdaptiveCoefficient",
    "AllChoices",
    "BASELayerRouter",
    "Balance",
    "BiasedLinearScorer",
    "Bigram",
    "CosineRouter",
    "CosineScorer",
    "CurrentToken",
    "DenseToSparseRouter",
    "ExpertChoiceRouter",
    "ExpertScorer",
    "Exploration",
    "ExponentialDecay",
    "GatingResidual",
    "GroupLimit",
    "HashKey",
    "HashRouter",
    "HierarchicalRouter",
    "InputDropout",
    "InputJitter",
    "LinearDecay",
    "LinearScorer",
    "LossFreeRouter",
    "NextToken",
    "NoTokenLeftBehind",
    "NoisyTopKRouter",
    "PreviousToken",
    "RandomChoice",
    "RankShuffle",
    "ReLURouter",
    "SampledChoice",
    "SampledSoftmax",
    "ScoredRouter",
    "SecondExpertPolicy",
    "SequenceCapacity",
    "SinkhornRouter",
    "SparseMixerRouter",
    "TaskRouter",
    "TaskScorer",
    "TaskTableRouter",
    "ThresholdChoice",
    "TokenPosition",
    "TopKRouter",
    "UniformRouter",
    "base_layers",
    "clear_padding",
    "deepseek_v3",
    "dense_to_sparse",
    "gshard",
    "hash_bigram",
    "hash_clustered",
    "hash_dispersed",
    "hash_layers",
    "hash_oracle",
    "hash_position",
    "hash_previous",
    "hash_random",
    "loss_free",
    "multi_hash",
    "noisy_topk",
    "remoe",
    "routing_of_choices",
    "st_moe",
    "switch",
    "zcode_m3",
]
