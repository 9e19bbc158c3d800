"""Training with Lightning: strategy, modules, optimizers, schedules, callbacks, metrics and checkpoints."""
