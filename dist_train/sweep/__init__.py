"""Studies: many runs of one configuration, as one command or as jobs of a cluster."""
