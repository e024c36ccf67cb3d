"""The command line: ``ptq-tdq``."""
