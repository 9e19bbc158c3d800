"""Training on one device through the Trainer, as a program: process groups and deterministic modes outlive a test.

``python gpu_program.py layouts|resume gpu|cpu``: prints what differs, and ends with 1 if anything does.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "distributed"))

from small_lm import DIM, EXPERTS, SmallLM, one_process, sentences, whole_weights

from moekit import ExpertParallelStrategy
from moekit.routers import InputJitter, TopKRouter
from moekit.training.callbacks.random_state import RandomState

QUIET: dict[str, Any] = {
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
    "use_distributed_sampler": False,
}
LAYOUTS: tuple[dict[str, Any], ...] = (
    *({"zero_stage": stage} for stage in (0, 1, 2, 3)),
    {"zero_stage": 3, "offload": "optimizer"},
    {"zero_stage": 3, "offload": "parameters"},
    {"zero_stage": 0, "offload": "optimizer"},
)


def layouts(accelerator: str) -> list[str]:
    """Every layout of one process against a loop without a Trainer, on the same device."""
    device = torch.device("cuda" if accelerator == "gpu" else "cpu")
    data, faults = sentences(), []
    wanted = one_process(SmallLM().to(device), data.to(device))
    for options in LAYOUTS:
        module = SmallLM()
        loader: Any = torch.utils.data.DataLoader(data, batch_size=8)  # type: ignore[arg-type]
        trainer = L.Trainer(
            accelerator=accelerator,
            strategy=ExpertParallelStrategy(expert_parallel_size=1, **options),
            max_epochs=1,
            gradient_clip_val=0.5,
            enable_checkpointing=False,
            **QUIET,
        )
        trainer.fit(module, loader)
        losses = [float(loss) for loss in module.losses]
        far = max(abs(a - b) / abs(b) for a, b in zip(losses, wanted["losses"], strict=True))
        weights = whole_weights(module)
        off = max(float((weights[n].to(device) - p).norm() / p.norm()) for n, p in wanted["weights"].items())
        if max(far, off) > 1e-4:
            faults.append(f"{options}: losses {far:.2g}, weights {off:.2g}")
    return faults


def resume(accelerator: str) -> list[str]:
    """Six steps with noise in the router and three choices a token, and twice three: the very same losses."""

    def router() -> TopKRouter:
        return TopKRouter(DIM, EXPERTS, 3, exploration=InputJitter(0.1), init_scale=1.0)

    def train(epochs: int, path: Path | None, save: Path | None) -> list[float]:
        L.seed_everything(1, verbose=False)
        module = SmallLM(router=router)
        loader: Any = torch.utils.data.DataLoader(sentences(1), batch_size=8)  # type: ignore[arg-type]
        trainer = L.Trainer(
            accelerator=accelerator, max_epochs=epochs, callbacks=[RandomState()], enable_checkpointing=False, **QUIET
        )
        trainer.fit(module, loader, ckpt_path=path, weights_only=path is not None)
        if save is not None:
            trainer.save_checkpoint(save)
        return [loss.item() for loss in module.losses]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "half.ckpt")
        whole = train(6, None, None)
        parts = train(3, None, path) + train(6, path, None)
    return [] if whole == parts else [f"without a stop {whole}, with one {parts}"]


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    found = {"layouts": layouts, "resume": resume}[sys.argv[1]](sys.argv[2])
    print("\n".join(found) or "right")
    sys.exit(bool(found))
