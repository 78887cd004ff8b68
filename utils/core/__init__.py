"""Files, processes, signals, errors and logs: what every other package stands on."""
