"""What a checkpoint folder holds, and its weights."""
