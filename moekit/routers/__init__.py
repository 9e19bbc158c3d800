"""Routers, one paper's idea per file, and presets named after papers."""

from moekit.routers.presets import gshard, st_moe, switch, zcode_m3
from moekit.routers.topk import Balance, RandomChoice, TopKRouter

__all__ = ["Balance", "RandomChoice", "TopKRouter", "gshard", "st_moe", "switch", "zcode_m3"]
