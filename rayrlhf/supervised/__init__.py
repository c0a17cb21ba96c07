"""Pretrain, sft, reward and dpo: the training loop they share, its checkpoints, and the tasks of reward and dpo."""
