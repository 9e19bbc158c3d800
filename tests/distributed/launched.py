"""A user's script: trains under the strategy with the processes it is started with, and writes what it got.

python launched.py OUT DEVICES NODES
"""

from __future__ import annotations

import sys
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist
from small_lm import CLIP, STEPS, Sentences, SmallLM, sentences, whole_weights

from moekit import ExpertParallelStrategy

if __name__ == "__main__":
    out, devices, nodes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    strategy = ExpertParallelStrategy(2, process_group_backend="gloo")
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        num_nodes=nodes,
        strategy=strategy,
        max_epochs=1,
        gradient_clip_val=CLIP,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    module = SmallLM()
    trainer.fit(module, datamodule=Sentences(sentences(STEPS)))
    weights = whole_weights(module)
    if trainer.is_global_zero:
        torch.save({"world": dist.get_world_size(), "weights": weights}, out)
