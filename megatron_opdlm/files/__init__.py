"""Files and folders: read with errors that a person can act on, written whole or not at all."""
