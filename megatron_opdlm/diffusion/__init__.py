"""The method's own objects: blocks, streams, trajectories, randomness. PyTorch alone."""
