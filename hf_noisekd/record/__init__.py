"""What is known of a student, and how it is stored; it knows nothing of models."""
