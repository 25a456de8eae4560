"""The embedded data set: drawn scenes whose every attribute is known, so a generated picture can be marked exactly."""
