"""Small invented worlds to run the whole recipe in: text, instructions, demonstrations, labelers and an exact judge.

`base.py` says what a world is and registers it; `instructions.py` is the built-in one (its kinds of instruction in
kinds.py, its words in words.py, its plain text in texts.py); `labelers.py` simulates people who rank responses;
`files.py` writes a world as the files that a user's own data would be.
"""
