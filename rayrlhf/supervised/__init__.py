"""Pretrain, sft, reward and dpo: the training loop they share, and dpo's task."""
