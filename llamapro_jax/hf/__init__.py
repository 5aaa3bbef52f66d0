"""Hugging Face files: what is read from them and what is written for others to read."""
