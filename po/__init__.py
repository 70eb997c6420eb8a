"""po: preference optimization of language models. Objectives are heads over one shared log-prob routine."""

__version__ = "0.1.0"
