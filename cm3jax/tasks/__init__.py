"""What the loop can train."""
