"""What `llamapro verify` looks at, a module for each kind of artefact."""
