"""Fast twins of readable functions, each with a parity test."""
