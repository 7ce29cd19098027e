"""Runs seen through the files in their directories: a table of many runs, a live view of one."""
