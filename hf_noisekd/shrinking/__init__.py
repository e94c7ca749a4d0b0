"""Cut a smaller network out of a teacher: whole blocks, and channels."""
