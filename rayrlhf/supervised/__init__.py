"""Pretrain, sft, reward and dpo: the training loop they share, its checkpoints, and dpo's task."""
