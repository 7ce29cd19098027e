"""The report: one HTML page of a run, a study, or a folder of runs, from what they left behind."""
