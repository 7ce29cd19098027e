"""Runs as they look from their directories: a table of many, a live view of one."""
