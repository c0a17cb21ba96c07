"""Around a run: supported.py compares installed versions with the tested ones."""
