"""Sharded checkpoints: whole or not there, for any layout, and data, not code.

    checkpointer = Checkpointer(asynchronous=True)
    checkpointer.save("run/checkpoints/last", model, [optimizer], extra={"step": step})
    extra = checkpointer.load("run/checkpoints/last", model, [optimizer])

`export_safetensors`, `consolidate` and `import_safetensors` change between these and one file of weights;
`gather_state_dict` gives a divided model's whole state dict.
"""

from moekit.parallel.checkpoint.checkpointer import (
    Checkpointer,
    is_checkpoint,
    read_extra,
    remove_checkpoint,
    verify_checkpoint,
)
from moekit.parallel.checkpoint.single_file import consolidate, export_safetensors, import_safetensors
from moekit.parallel.shards import gather_state_dict

__all__ = [
    "Checkpointer",
    "consolidate",
    "export_safetensors",
    "gather_state_dict",
    "import_safetensors",
    "is_checkpoint",
    "read_extra",
    "remove_checkpoint",
    "verify_checkpoint",
]
