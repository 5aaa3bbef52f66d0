"""Sources of every kind to documents, in pieces that processes read by themselves."""
