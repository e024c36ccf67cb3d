"""Training and evaluation of the embedded reference model; ``../train_reference.py`` is the command line."""
