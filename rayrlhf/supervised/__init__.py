"""Pretrain, sft, reward and dpo: the training loop they share, and the tasks of reward and dpo."""
