"""A small base made from text that every Python carries, and the whole path run on it."""
