"""Starting a run: on more than one process, on a cluster, on a TPU that comes and goes."""

# The module that every launcher starts on every host or GPU.
ENTRY = "llamapro_jax.launch.entry"
