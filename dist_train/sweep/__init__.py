"""Studies: many runs of one configuration, started by one command or as cluster jobs."""
