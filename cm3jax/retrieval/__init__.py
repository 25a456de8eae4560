"""The memory: documents embedded, their nearest found exactly, and the rules by which samples take them."""
