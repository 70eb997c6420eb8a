"""Rows in, token ids out: read (`read`, `formats`), one Row (`rows`), token ids (`tokenize`), items (`layout`)."""
