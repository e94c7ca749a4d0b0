"""What learns: configurations, losses, evaluation, and the trainers."""
