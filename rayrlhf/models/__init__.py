"""Models: build.py loads or makes them (policy, reward, value), logprobs.py turns logits into log-probs."""
