"""Checkpoints: their files, the thread that writes them, and the state that they hold."""
