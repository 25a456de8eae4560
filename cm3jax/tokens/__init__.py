"""Vocabulary, text tokenizer, and documents as ids."""
