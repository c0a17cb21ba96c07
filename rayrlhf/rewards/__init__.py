"""Reward sources that read text.

base.py       the protocol, and what counts as a reward
function.py   Python code
http.py       a service
retry.py, breaker.py   how a call that failed is made again, and when no more

Reward models, alone and in ensembles, read tokens instead: actors/sources.py has all of them behind one role.
"""
