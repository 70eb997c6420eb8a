"""Rows in, token ids out. In order: `sources` and `read` (records), `view`, `messages`, `facts`, `prompts`, `formats`
(one Row), `tokenize` and `overlong` (token ids), `build`, `store` and `prepare` (once, on disk), `layout` (what heads
see). `report` counts what became of every row; `show` prints what is scored.
"""
