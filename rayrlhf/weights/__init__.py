"""The weight-sync contract: policy ranks -> engines, versioned and verified.

publish.py      the choreography, and what counts as verified
buckets.py      many parameters as one run of bytes, tied heads under both names; fingerprints
probe.py        the log-prob comparison that fingerprints cannot replace
transports/     how the bytes travel, a file each
"""
