"""Which models keep the texts of a packed row apart."""

from __future__ import annotations

from typing import Any

from moekit.errors import UserError

PACKABLE = frozenset(
    (
        "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "GraniteMoeForCausalLM", "MixtralForCausalLM",
        "OlmoeForCausalLM", "PhimoeForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM",
    )
)  # fmt: skip
"""Classes of transformers whose masks follow position_ids that begin anew; every one of them is tested to do so.

GptOssForCausalLM is not one: in transformers 5.23 it makes its masks without position_ids.
"""


def require_packable(model: Any) -> None:
    """Make sure that a model keeps texts of a row apart.

    Raises:
        UserError: naming the class: it is not known to do so.
    """
    name = type(model).__name__
    if name not in PACKABLE:
        raise UserError(
            f"data.pack needs a model whose attention keeps the texts of a row apart: {name} is not known to do so. "
            f"Give --data.pack false. Known are {', '.join(sorted(PACKABLE))}."
        )
