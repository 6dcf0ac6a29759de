"""The sections of `gpu_check.py`, each with its rows, run in a process of its own."""
