"""What is told of a student: its record, card and figures, and the ways to publish it."""
