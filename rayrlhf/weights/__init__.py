"""The weight-sync contract: policy ranks -> engines, versioned and verified.

publish.py      the choreography, and what counts as verified
buckets.py      many parameters as one run of bytes; fingerprints
names.py        what is sent under which name, tied heads included
probe.py        the log-prob comparison that fingerprints cannot replace
transports/     how the bytes travel, a file each
"""
