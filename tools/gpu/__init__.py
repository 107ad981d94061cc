"""What one GPU is asked in one go: see survey.py."""
