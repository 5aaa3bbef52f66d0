"""The parts of chaos.py: what trains, how it is disturbed, how what is left is judged."""
