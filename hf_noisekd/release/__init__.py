"""Publishing a student: its model card with figures, and the push to the Hub."""
