"""The objects of the method: blocks, streams, trajectories, randomness. Needs PyTorch only."""
