"""Documents of several stages: what each stage runs, in which order, and with which results of the others."""
