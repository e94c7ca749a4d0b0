"""The record of a student: what is known of it, as plain data, independent of models."""
