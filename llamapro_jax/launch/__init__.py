"""Starting a run on more than one process."""
