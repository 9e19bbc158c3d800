"""Fine-tuning of folders of transformers: text and conversations in, a folder or adapters for PEFT out.

What `moekit finetune --model FOLDER` does, as functions.
"""

from moekit.folders.finetune import FineTuned, finetune_folder
from moekit.folders.settings import FolderConfig, TextConfig, TuneConfig

__all__ = ["FineTuned", "FolderConfig", "TextConfig", "TuneConfig", "finetune_folder"]
