"""One module a verb of the command line: what it takes, and which function does it.

Each has `HELP` (a line), a docstring (what it does), `EXAMPLE` (commands), `add_arguments(parser)`
and `run(arguments)`, and `STOPPED` where a signal leaves more to say than that. They import jax and
the rest inside `run`, so that `--help` answers at once.
"""
