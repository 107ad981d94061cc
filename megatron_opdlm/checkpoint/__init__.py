"""The files of a checkpoint folder, and the loading of its weights."""
