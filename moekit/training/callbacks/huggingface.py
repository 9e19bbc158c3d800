"""The callback by which moekit's layers move with time under the Trainer of Hugging Face transformers."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from moekit.stepping import forget, listen, step_end, stop_listening, tell_routings


class StepEndCallback(TrainerCallback):
    """Tells routers what they returned and that an optimizer step is done: ``Trainer(callbacks=[StepEndCallback()])``.

    What `moekit.training.callbacks.binding.ComponentBinding` does under Lightning; steps are
    ``TrainerState.global_step``, so a resumed run goes on. It runs before the Trainer writes a checkpoint.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        listen(kwargs["model"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        forget(kwargs["model"])  # from here on forwards are training's; what was returned before is nobody's

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tell_routings(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step_end(kwargs["model"], state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stop_listening(kwargs["model"])
