"""Small invented worlds to run the whole recipe in.

A world is text to pretrain on, demonstrations, rankings and prompts about things whose answers a program can check,
so that a run's quality can be measured exactly and nothing has to be downloaded. `starter` is the first: a few
thousand records, enough for `make demo`.
"""
