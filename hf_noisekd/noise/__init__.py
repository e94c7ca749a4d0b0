"""What is drawn: distributions, what their names mean, and the data sets that serve them."""
