"""What versions of transformers must load and we import; see tools/check_transformers.sh."""
