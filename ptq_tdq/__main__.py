"""``python -m ptq_tdq`` is ``ptq-tdq``."""

from ptq_tdq.cli.main import main

if __name__ == "__main__":
    main()
