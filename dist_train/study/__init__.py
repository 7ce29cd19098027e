"""Many runs: tables, learning curves, sweeps and reports. Reads run directories and checkpoints."""
