"""What a user wants done, from names of models and data sets to files: a function for each command."""
