"""What the tasks are called, and how their samples are worded: the same on the page, the terminal and in markdown."""

from __future__ import annotations

from dataclasses import dataclass

TASKS = {
    "translation": "Translation",
    "denoising": "Denoising",
    "masked_lm": "Masked words",
    "replaced_token": "Replaced-token detection",
    "causal_lm": "Next word",
}
EXPLAINED = {
    "translation": "Write a sentence in another language, word by word.",
    "denoising": "Restore a sentence from which words were cut or dropped.",
    "masked_lm": "Guess the words hidden in a sentence, in the encoder alone.",
    "replaced_token": "Tell which words of a sentence a small generator has replaced.",
    "causal_lm": "Guess the next word of a text.",
    "": "The sum of all tasks and the routers' penalties.",
}


@dataclass(frozen=True)
class SampleWording:
    """How the samples of a task are presented.

    Attributes:
        title: heading of the section.
        lead: what the samples are, and what the marked words mean.
        source: name of what the model was given.
        reference: name of what would have been right.
        noun: what one sample is.
        unknown: heading of samples that do not say their direction or language.
    """

    title: str
    lead: str
    source: str
    reference: str
    noun: str = "text"
    unknown: str = "language not recorded"


_SAMPLES = {
    "translation": SampleWording(
        "Sample translations",
        "Held-out sentences the model never saw. Marked words stand in the reference too, in the same order; an "
        "unmarked word may still be a good synonym.",
        "Source",
        "Reference",
        "sentence",
        "direction not recorded",
    ),
    "causal_lm": SampleWording(
        "Sample continuations",
        "Beginnings of held-out texts the model never saw, and how it went on. Marked words stand in the true "
        "continuation too, in the same order; a text can go on in many ways, so judge whether it reads well.",
        "Prompt",
        "True continuation",
    ),
    "denoising": SampleWording(
        "Samples of restored text",
        "Held-out texts the model never saw, damaged and restored. Marked words stand in the original too, in the "
        "same order; an unmarked word may still fit the gap.",
        "Damaged",
        "Original",
    ),
}
_OTHER = SampleWording(
    "Samples",
    "Held-out texts the model never saw. Marked words stand in the expected text too, in the same order.",
    "Input",
    "Expected",
)


def task_title(task: str) -> str:
    """The task as a heading; a task that is not ours under its own name."""
    return TASKS.get(task, task.replace("_", " ").capitalize())


def sample_wording(task: str) -> SampleWording:
    """The wording for samples of `task`; a neutral one for a task that is not ours."""
    return _SAMPLES.get(task, _OTHER)
