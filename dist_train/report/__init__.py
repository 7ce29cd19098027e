"""The report: one HTML page about a run, a study or a folder of runs, from the files that they wrote."""
