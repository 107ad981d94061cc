"""Questions with checkable answers: grading, decoding settings side by side, reports."""
