"""The program that composes a training run from the library."""
