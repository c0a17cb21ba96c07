"""What survives a run on disk: artifacts.py holds finished stages, with their lineage; store.py checkpoints; ledger.py
what became of each sample, and the proof of it."""
