"""What a model needs on a layout, by arithmetic: memory, communication, operations; nothing is run.

    plan(TransformerShape(...) or module, Layout(devices=64, expert_parallel_size=8), Training(...)) -> Forecast

`largest` finds the largest model for given devices, `fewest_devices` the fewest devices for a given model, and
`measure` is what the formulas are tested against.
"""

from moekit.parallel.layout import DEEPSPEED_FP16, PRECISIONS, Layout, Precision, Training
from moekit.planner.census import Census, GatheredUnit, Weight, take_census
from moekit.planner.costs import Cost
from moekit.planner.forecast import GIB, Forecast, compare, plan
from moekit.planner.measure import Measured, measure
from moekit.planner.memory import Memory
from moekit.planner.search import fewest_devices, largest
from moekit.planner.shape import DEEPSPEED_3_5T, ST_MOE_32B, ZCODE_M3_10B, TransformerShape
from moekit.planner.traffic import Traffic

__all__ = [
    "DEEPSPEED_3_5T",
    "DEEPSPEED_FP16",
    "GIB",
    "PRECISIONS",
    "ST_MOE_32B",
    "ZCODE_M3_10B",
    "Census",
    "Cost",
    "Forecast",
    "GatheredUnit",
    "Layout",
    "Measured",
    "Memory",
    "Precision",
    "Traffic",
    "Training",
    "TransformerShape",
    "Weight",
    "compare",
    "fewest_devices",
    "largest",
    "measure",
    "plan",
    "take_census",
]
