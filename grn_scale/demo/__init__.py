"""The demonstration job: moving shapes, their detector, and the sequence of commands."""
