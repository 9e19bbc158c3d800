"""Exchange with Hugging Face transformers: SwitchTransformers and NllbMoe folders in, ours out, safetensors only.

found = import_model("switch-base-8")
export_model(found.model, "again", tokens=found.tokens)
"""

from moekit.huggingface.architecture import Architecture
from moekit.huggingface.model import describe
from moekit.huggingface.reading import Blueprint, Imported, import_model, open_folder
from moekit.huggingface.tokenizers import read_tokenizer
from moekit.huggingface.writing import export_model

__all__ = [
    "Architecture",
    "Blueprint",
    "Imported",
    "describe",
    "export_model",
    "import_model",
    "open_folder",
    "read_tokenizer",
]
