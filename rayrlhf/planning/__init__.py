"""What a run needs and how long it takes, from the config and the models' shapes alone: plain arithmetic, no torch."""
