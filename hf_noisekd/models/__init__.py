"""What answers: classifiers, where they are kept, and their BatchNorm statistics."""
