"""Training on many devices: planning what fits, sharding, checkpoints."""
