"""The machine: GPUs through NVML, power and energy, slots, systemd."""
