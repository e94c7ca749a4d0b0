"""Statistics without data: images matched to what a teacher stores, and running statistics re-estimated from images."""
