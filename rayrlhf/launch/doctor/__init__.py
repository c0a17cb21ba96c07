"""`rayrlhf doctor`: what of a machine or a cluster would stop a run, found before one starts.

probes.py, outposts.py, toy.py    measure, on every node          -> facts.py
checks.py, wiring.py              facts in, a `Finding` out; pure  -> findings.py
examination.py                    what is asked of whom, in which order
"""
