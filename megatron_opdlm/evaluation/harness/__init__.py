"""Tasks of lm-eval, the harness of EleutherAI, decoded by the student."""
