"""What survives a run on disk: artifacts.py holds finished stages, with their lineage."""
