"""Hugging Face transformers: its sparse models adopted in place, and folders in and out, safetensors only.

model = adopt(AutoModelForCausalLM.from_pretrained(folder))   # Mixtral, OLMoE, Qwen, DeepSeek, GPT-OSS, Switch, ...
model = adopt_folder(folder, device="meta")                   # divided before it is read
model = upcycle(AutoModelForCausalLM.from_pretrained(dense))  # a dense one made sparse
write_adapters(model, "adapter")                              # of moekit.surgery.add_adapters, for PEFT

found = import_model("switch-base-8")                         # as a model of ours
export_model(found.model, "again", tokens=found.tokens)
"""

from moekit.huggingface.adopt import adopt, routings
from moekit.huggingface.adopted_layer import AdoptedLayer
from moekit.huggingface.architecture import Architecture
from moekit.huggingface.card import write_card
from moekit.huggingface.consolidating import consolidate_folder
from moekit.huggingface.expert_layout import ExpertLayer, ExpertLayout, folder_layout, layout_of
from moekit.huggingface.folder import adopt_folder
from moekit.huggingface.merging import merge
from moekit.huggingface.model import describe
from moekit.huggingface.peft_adapters import read_adapters, write_adapters
from moekit.huggingface.pruning import choose_kept, prune
from moekit.huggingface.reading import Blueprint, Imported, import_model, open_folder
from moekit.huggingface.saving import write_folder
from moekit.huggingface.sparse_blocks import SPARSE_BLOCKS
from moekit.huggingface.tokenizers import read_tokenizer
from moekit.huggingface.upcycling import UPCYCLED, upcycle
from moekit.huggingface.writing import export_model

__all__ = [
    "SPARSE_BLOCKS",
    "UPCYCLED",
    "AdoptedLayer",
    "Architecture",
    "Blueprint",
    "ExpertLayer",
    "ExpertLayout",
    "Imported",
    "adopt",
    "adopt_folder",
    "choose_kept",
    "consolidate_folder",
    "describe",
    "export_model",
    "folder_layout",
    "import_model",
    "layout_of",
    "merge",
    "open_folder",
    "prune",
    "read_adapters",
    "read_tokenizer",
    "routings",
    "upcycle",
    "write_adapters",
    "write_card",
    "write_folder",
]
