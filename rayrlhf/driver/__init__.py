"""The driver: loop.py is the step on one page, protocols.py what it needs of the rest, pacing.py when to sample."""
