"""Teacher and student, and the student's pass of an optimizer step."""
