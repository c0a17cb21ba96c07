"""Models: build.py loads or makes them (policy, reward, value), attention.py says what kernels they attend with,
logprobs.py turns logits into log-probs, vllm_layers.py how a model of vLLM's takes new weights."""
