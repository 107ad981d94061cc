"""Questions with checkable answers: grading, comparison of decoding settings, reports."""
