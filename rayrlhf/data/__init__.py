"""From files to token arrays; nothing here needs torch or a cluster.

    sources.py      where records live: files and Hugging Face datasets, row by row, each row with its file:line
    readers.py      rows -> PretrainText, Demonstration, Ranking, Prompt; every bad record is named
    split.py        train / held-out by prompt, so that no prompt is on both sides
    chat.py         chat templates: turns -> token ids; which tokenizers can be used at all
    tokenizer.py    trains a byte-level BPE tokenizer for models built from scratch
    prompts.py      records -> token arrays within the token limits
    batching.py     balance over ranks, micro-batches by token budget, padding, epoch order

Within the package, readers uses sources, and tokenizer and prompts use chat; the rest stand alone.
"""
