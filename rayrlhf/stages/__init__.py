"""Wiring: config -> data -> actors -> loop. run.py chains the stages; a file (or a function) per stage."""
