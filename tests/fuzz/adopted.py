"""Folders of sparse models of transformers whose settings were changed, opened by transformers and adopted.

What transformers opens and runs is adopted and answers the same, or is refused; what transformers itself refuses, or
could not run, is none of ours.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekit.errors import UserError
from moekit.huggingface import adopt

_SIZES: Mapping[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 12, "moe_intermediate_size": 12, "max_position_embeddings": 32, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "num_experts_per_tok": 2,
}  # fmt: skip
_MODELS: Mapping[str, Mapping[str, Any]] = {
    "MixtralConfig": {"num_local_experts": 4},
    "OlmoeConfig": {"num_experts": 4},
    "Qwen3MoeConfig": {"num_experts": 4, "head_dim": 8},
}
_LARGEST = 512
"""Numbers of a configuration that are tried: others would be a question of memory, which transformers answers."""


_SETTINGS = (
    "num_experts_per_tok", "num_local_experts", "num_experts", "norm_topk_prob", "hidden_act", "router_aux_loss_coef",
    "router_jitter_noise", "output_router_logits", "decoder_sparse_step", "mlp_only_layers", "clip_qkv",
    "moe_intermediate_size", "intermediate_size", "tie_word_embeddings", "sliding_window", "attention_dropout",
    "num_hidden_layers", "architectures", "model_type", "dtype",
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    0, 1, 2, 3, 4, 5, -1, 0.0, 0.5, 2.0, 1e-3, True, False, None, "relu", "silu", "gelu", "gelu_new", "nothing", [],
    [0], [0, 1], ["MixtralForCausalLM"], "mixtral", "olmoe", "qwen3_moe", "bfloat16",
)  # fmt: skip


def odd_setting(data: bytes, chance: random.Random) -> bytes:
    """One or two settings that matter to sparse layers have other values, most of them possible ones."""
    settings = json.loads(data)
    for _ in range(chance.choice([1, 1, 2])):
        settings[chance.choice(_SETTINGS)] = chance.choice(_VALUES)
    return json.dumps(settings).encode()


def make_adopted(place: Path) -> None:
    import transformers

    for name, sizes in _MODELS.items():
        torch.manual_seed(0)
        config = getattr(transformers, name)(**_SIZES, **sizes)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(place / name)


def read_adopted(place: Path) -> Any:
    """The answers of each model once adopted; they are compared with its answers before."""
    found = {}
    for name in _MODELS:
        model, ids, before = _opened(place / name)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                adopt(model)
        except UserError as error:
            raise UserError(f"{place.parent}: {error}") from None
        after = _answers(model, ids)
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4, equal_nan=True)
        found[name] = after.tolist()
    return found


def _opened(folder: Path) -> tuple[Any, Tensor, Tensor]:
    """The model, what it is asked and what it answers.

    Raises:
        UserError: transformers has an error of its own, or it would be large.
    """
    import transformers

    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        if any(isinstance(number, int | float) and not abs(number) <= _LARGEST for number in _numbers(config)):
            raise ValueError("large")
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            ids = torch.arange(3, 15).view(2, 6) % model.config.vocab_size
            return copy.deepcopy(model), ids, _answers(model, ids)
    except Exception as error:
        raise UserError(f"{folder.parent.parent}: transformers: {type(error).__name__}") from None


def _answers(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits  # type: ignore[no-any-return]


def _numbers(tree: Any) -> Iterator[Any]:
    """Those of a configuration, but for rates and bases of positions, which cost nothing."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        if isinstance(value, dict | list):
            yield from _numbers(value)
        elif "theta" not in str(key):
            yield value
