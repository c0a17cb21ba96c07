"""Around a run: supported.py compares versions with the tested ones, manifests.py renders the files of a cluster."""
