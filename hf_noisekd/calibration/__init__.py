"""Images matched to a teacher's stored statistics, and running statistics re-estimated from images."""
