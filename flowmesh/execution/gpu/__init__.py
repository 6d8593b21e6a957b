"""GPUs of tasks: baseline, sampling, proven release, quarantine."""
