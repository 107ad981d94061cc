"""The training loop, from the command to the checkpoints."""
